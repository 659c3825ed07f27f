"""Tests of the suite: strategies and engines with one deliberate defect each, and correct ones that look odd.

Every MUST clause has a saboteur that this clause must kill. No clause may accuse a control.
"""
