"""What a benchmark refuses."""


class BenchError(ValueError):
    """Arguments that cannot be measured, said for the person who gave them."""
