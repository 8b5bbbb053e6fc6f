"""What can go wrong when a model becomes a graph."""


class ExportError(ValueError):
    """A model cannot be a graph as asked for, or its graph does not do what the model does."""
