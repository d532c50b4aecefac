"""The OpenAI REST interface: what may be asked, and what an answer looks like."""
