"""What the person who benchmarks can mend."""

from ...runs.errors import EvaluationError


class BenchError(EvaluationError):
    """Arguments that cannot be measured; the message says which and why."""
