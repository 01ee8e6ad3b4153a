"""Why a module is left alone: sentences about the user's code."""

import os


class Unexplained(Exception):
    """Why a module is left alone."""


class Untraceable(Unexplained):
    """Its forward does something that symbolic values do not take part in."""


class Differs(Unexplained):
    """It is the operator in what it returns, but not in every respect or mode."""


class Amid(Unexplained):
    """It is not the operator, but has it among other code."""


def first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__


def place(file: str, lines: str | int) -> str:
    """file:lines, the file as seen from the current folder."""
    return f"{file.removeprefix(os.getcwd() + os.sep)}:{lines}"
