"""What a function does, counted: the same on a fast machine, a slow one, and a busy one."""
import sys


def python_lines(function, *arguments) -> int:
    "How many lines of Python a call executes: a loop over pixels or words shows, whatever it costs today."
    lines, before = 0, sys.gettrace()

    def trace(frame, event, argument):
        nonlocal lines
        lines += event == "line"
        return trace

    sys.settrace(trace)
    try:
        function(*arguments)
    finally:
        sys.settrace(before)
    return lines
