"""TLS for those who are served: the certificate and key of a deployment."""

from __future__ import annotations

import ssl

from .config import SecuritySection
from .errors import ConfigError


def tls_context(security: SecuritySection) -> ssl.SSLContext | None:
    """None where none is asked for; ConfigError where the files can't be used."""
    if security.tls_cert is None or security.tls_key is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(security.tls_cert, security.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"security.tls_cert, security.tls_key: {security.tls_cert} and {security.tls_key} "
            f"are no certificate with its key: {error.strerror or error}"
        ) from error
    return context
