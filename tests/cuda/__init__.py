def is_of_reference(test: str) -> bool:
    """Whether the test of that id asks for the reference alone, so that no kernel runs."""
    return "[reference" in test or "-reference" in test
