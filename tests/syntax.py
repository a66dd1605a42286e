"""Python source as a syntax tree."""

import ast
import gc


def parse(source: str) -> ast.Module:
    """Return the tree of `source`. Raises SyntaxError.

    The garbage collector is off meanwhile. In Python 3.11.2, Debian 12's, a collection in the middle makes `ast.parse` raise
    SystemError ("AST constructor recursion depth mismatch").
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(source)
    finally:
        if collects:
            gc.enable()
