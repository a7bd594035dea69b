"""A tool that looks something up, as a file has it."""

LOOK = '''
def look(query: str) -> str:
    """
    Looks something up.

    Args:
        query: What.
    """
    return query
'''
