"""The one exception type that a user of the compiler sees."""


class CompileError(ValueError):
    """A model that cannot be compiled; the message names the thing, the rule and the remedy."""
