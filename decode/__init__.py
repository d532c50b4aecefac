"""The decode phase: reserve, receive, the running batch. No torch."""
