"""Names that rows of benchmarks have in common; without torch, for the report."""

OURS = "ours"

# Behind a provider: it ran with torch's determinism, and ours without.
FIXED = ", deterministic"
FREE = ", torch's determinism off"
# Reasons why a rival was not tried; any other one says what became of it.
LEFT_OUT = "left out, the time is over"
ABSENT = "cannot be imported"


def is_ours(provider: str) -> bool:
    """Whether it is an implementation of ours, in whichever setting."""
    return provider == OURS or provider.startswith(f"{OURS},")
