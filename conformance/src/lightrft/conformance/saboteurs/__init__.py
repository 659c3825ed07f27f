"""The suite judged: strategies and engines with one deliberate defect each, and odd ones that are right.

Every MUST clause has a saboteur that it, and not another, must kill; a control must not be accused by any.
"""
