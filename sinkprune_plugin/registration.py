"""Every entry point and registry in one place."""


def arm() -> None:
    """Arrange that the package's classes are registered when llm-compressor or transformers is imported."""
