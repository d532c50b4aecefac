"""Cost models: the fit, what a step holds, and the correction by what steps really take."""

from __future__ import annotations

import random

import pytest
from pydantic import TypeAdapter, ValidationError

from pdserve.core.cost import (
    CalibratedCost,
    Calibration,
    DecodeCost,
    DecodePoint,
    MixedPoint,
    PrefillCost,
    PrefillPoint,
    StepCost,
    fit_decode,
    fit_prefill,
    fit_step,
    pairs,
)

# docs/results/h200-8b-steps.json
PREFILL = [
    PrefillPoint(((2048, 0),), 48.74),
    PrefillPoint(((8192, 0),), 208.78),
    PrefillPoint(((512, 0),) * 16, 183.84),
]
DECODE = [
    DecodePoint(1, 1024, 4.654),
    DecodePoint(64, 64 * 1024, 7.043),
    DecodePoint(256, 256 * 1024, 15.307),
    DecodePoint(32, 32 * 4096, 9.174),
]


def chunk_ms(cost: PrefillCost, chunks: tuple[tuple[int, int], ...]) -> float:
    return cost.base_ms + sum(cost.work_ms(*chunk) for chunk in chunks)


def test_the_fit_finds_the_coefficients_it_was_made_from() -> None:
    truth = PrefillCost(2.0, 0.022, 8e-7)
    shapes = [((16, 0),), ((512, 0),), ((2048, 4096),), ((8192, 0),), ((512, 0),) * 8]
    points = [PrefillPoint(shape, chunk_ms(truth, shape)) for shape in shapes]
    found = fit_prefill(points)
    assert found.base_ms == pytest.approx(2.0)
    assert found.per_token_ms == pytest.approx(0.022)
    assert found.per_pair_ms == pytest.approx(8e-7)


def test_the_fit_of_a_measured_gpu_is_close() -> None:
    prefill, decode = fit_prefill(PREFILL), fit_decode(DECODE)
    for prefill_point in PREFILL:
        assert chunk_ms(prefill, prefill_point.chunks) == pytest.approx(prefill_point.ms, rel=0.001)
    for point in DECODE:
        assert decode.ms(point.batch, point.kv_tokens) == pytest.approx(point.ms, rel=0.05)
    # the KV of an 8B shape is 128 KiB a token, and memory gives no more than 4.4 TB/s
    assert decode.per_kv_token_ms >= 131072 / 4.4e12 * 1e3


def test_no_coefficient_is_negative() -> None:
    points = [PrefillPoint(((n, 0),), ms) for n, ms in ((100, 10.0), (200, 15.0), (400, 19.0))]
    found = fit_prefill(points)  # bends down: the best parabola would have a negative term
    assert found.per_pair_ms == 0.0
    assert found.base_ms > 0 and found.per_token_ms > 0


def test_one_point_gives_a_line_through_it() -> None:
    assert fit_decode([DecodePoint(1, 64, 5.0)]).ms(1, 64) == pytest.approx(5.0)


def test_no_tokens_cost_nothing() -> None:
    assert PrefillCost(2.0, 1.0, 1.0).ms(0, 100) == 0.0
    assert DecodeCost(2.0, 1.0, 1.0).ms(0, 0) == 0.0


def test_chunks_add_up_to_their_prompt() -> None:
    cost = PrefillCost(2.0, 0.022, 8e-7)
    whole = cost.work_ms(4096)
    assert sum(cost.work_ms(512, at) for at in range(0, 4096, 512)) == pytest.approx(whole)
    assert pairs(3) == 6
    assert pairs(2, 10) == 11 + 12


@pytest.mark.parametrize("context", [0, 100, 30_000])
@pytest.mark.parametrize("cost", [PrefillCost(2, 0.022, 8e-7), PrefillCost(0, 0, 1e-3)])
def test_tokens_within_a_time_are_the_most_there_are(cost: PrefillCost, context: int) -> None:
    found = cost.tokens_within(10.0, context)
    assert cost.work_ms(found, context) <= 10.0 < cost.work_ms(found + 1, context)
    assert cost.tokens_within(0.0, context) == 0


def test_a_chunk_beside_a_batch_shares_the_read_of_the_weights() -> None:
    cost = StepCost(PrefillCost(2.0, 0.02, 0.0), DecodeCost(5.0, 0.01, 1e-5))
    assert cost.ms(100, 100_000, 0.0) == pytest.approx(7.0)
    assert cost.ms(0, 0, 10.0) == pytest.approx(12.0)
    assert cost.ms(0, 0, 1.0) == pytest.approx(5.0)  # the weights are read whatever it holds
    # 100 rows are 2 ms of work as well, beside attention's 1
    assert cost.ms(100, 100_000, 10.0) == pytest.approx(1.0 + 2.0 + 2.0 + 10.0)
    assert cost.ms(100, 100_000, 1.0) == pytest.approx(7.0)


def test_a_step_of_a_gpu_that_has_both_takes_what_its_rows_do() -> None:
    """Of an 8B shape on an H200: 128 sequences of 1,024 tokens, chunks beside them."""
    cost = StepCost(PrefillCost(2.044, 0.022, 7.9e-7), DecodeCost(4.56, 0.007, 3.35e-5), 0.9)
    for num_tokens, measured in ((64, 10.96), (256, 14.59), (512, 20.33), (1024, 31.05)):
        work_ms = cost.prefill.work_ms(num_tokens)
        assert cost.ms(128, 128 * 1024, work_ms) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("batch", [0, 1, 100])
@pytest.mark.parametrize("ms", [-10.0, 0.0, 6.0, 20.0, 100.0])
@pytest.mark.parametrize("beside_ms", [0.0, 2.5])
def test_the_room_for_chunks_in_a_step_fills_it(batch: int, ms: float, beside_ms: float) -> None:
    cost = StepCost(PrefillCost(2.0, 0.02, 0.0), DecodeCost(5.0, 0.01, 1e-5), beside_ms)
    room = cost.chunk_within(batch, batch * 100, ms)
    if room > cost.least_work_ms(batch):
        assert cost.ms(batch, batch * 100, room) == pytest.approx(ms)
    else:
        assert cost.ms(batch, batch * 100, cost.least_work_ms(batch) + 1e-6) >= ms - 1e-9


def test_a_chunk_beside_a_batch_costs_something_however_small_it_is() -> None:
    cost = StepCost(PrefillCost(2.0, 0.02, 0.0), DecodeCost(5.0, 0.01, 1e-5), 2.5)
    assert cost.ms(100, 100_000, 0.0) == pytest.approx(7.0)
    assert cost.ms(100, 100_000, 1.0) == pytest.approx(7.0 + 2.5)
    assert cost.ms(100, 100_000, 10.0) == pytest.approx(1.0 + 2.0 + 2.0 + 10.0 + 2.5)
    assert cost.ms(0, 0, 10.0) == pytest.approx(12.0)
    assert cost.scaled(1.0, 1.0, 100.0).beside_ms == 5.0  # as much as a step of each


def test_what_mixed_steps_take_beyond_both_is_fitted_and_followed() -> None:
    truth = StepCost(PrefillCost(2.0, 0.02, 0.0), DecodeCost(5.0, 0.01, 1e-5), 2.0)
    prefill = [PrefillPoint(((n, 0),), truth.prefill.ms(n)) for n in (256, 1024, 2048)]
    shapes = [(1, 16), (256, 4096), (256, 262_144), (64, 1024)]
    decode = [DecodePoint(*shape, truth.decode.ms(*shape)) for shape in shapes]
    mixed = [
        MixedPoint(32, 32_768, (n, n), truth.ms(32, 32_768, truth.prefill.work_ms(n, n)))
        for n in (128, 256)
    ]
    found = fit_step(prefill, decode, mixed)
    assert found.beside_ms == pytest.approx(2.0, rel=0.01)
    assert fit_step(prefill, decode).beside_ms == 0.0
    seen = CalibratedCost(found)
    rng = random.Random(2)
    for _ in range(400):
        taken = truth.ms(32, 32_768, 1.0) + 1.0 + rng.gauss(0.0, 0.5)
        seen = seen.observed(32, 32_768, 1.0, taken)
    assert seen.cost.beside_ms == pytest.approx(3.0, rel=0.1)
    assert seen.prefill.factor == seen.decode.factor == 1.0


def test_calibration_follows_a_lasting_change_and_not_the_jitter() -> None:
    rng = random.Random(1)
    calibration = Calibration()
    assert calibration.factor == 1.0
    for _ in range(300):
        calibration = calibration.observed(10.0, 11.5 * rng.gauss(1.0, 0.2))
    assert calibration.factor == pytest.approx(1.15, abs=0.06)
    before = calibration.factor
    assert abs(calibration.observed(10.0, 11.5 * 1.5).factor / before - 1) < 0.02


def test_one_very_long_step_is_not_a_trend() -> None:
    calibration = Calibration()
    for _ in range(100):
        calibration = calibration.observed(10.0, 10.0)
    assert calibration.observed(10.0, 60_000.0).factor < 1.2


def test_calibration_ignores_what_was_not_forecast() -> None:
    assert Calibration().observed(0.0, 5.0) == Calibration()


def test_each_phase_is_corrected_by_its_own_steps() -> None:
    measured = StepCost(PrefillCost(2.0, 0.02, 0.0), DecodeCost(5.0, 0.01, 1e-5))
    truth = measured.scaled(1.3, 0.9)
    seen = CalibratedCost(measured)
    for batch, chunk_ms in [(0, 40.0), (50, 0.0), (50, 40.0)] * 200:
        kv_tokens = batch * 1000
        taken = truth.ms(batch, kv_tokens, chunk_ms * 1.3)
        seen = seen.observed(batch, kv_tokens, chunk_ms, taken)
    assert seen.prefill.factor == pytest.approx(1.3, rel=0.03)
    assert seen.decode.factor == pytest.approx(0.9, rel=0.01)
    assert seen.cost.ms(50, 50_000, 52.0) == pytest.approx(truth.ms(50, 50_000, 52.0), rel=0.03)


def test_a_chunk_that_fits_under_the_read_of_the_weights_teaches_nothing_of_prefill() -> None:
    measured = StepCost(PrefillCost(2.0, 0.02, 0.0), DecodeCost(5.0, 0.01, 1e-5))
    seen = CalibratedCost(measured)
    assert seen.observed(20, 400_000, 1.0, 30.0) == seen


def test_what_travels_is_validated() -> None:
    adapter = TypeAdapter(StepCost)
    cost = StepCost(PrefillCost(2.0, 0.02, 0.0), DecodeCost(5.0, 0.01, 1e-5))
    assert adapter.validate_json(adapter.dump_json(cost)) == cost
    for wrong in (b'{"base_ms":-1,"per_token_ms":0,"per_pair_ms":0}', b'{"base_ms":1}'):
        with pytest.raises(ValidationError):
            TypeAdapter(PrefillCost).validate_json(wrong)
