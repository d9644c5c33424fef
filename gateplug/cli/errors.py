"""Errors that a person can correct."""


class UserError(Exception):
    """Its text is the whole paragraph that the person reads."""
