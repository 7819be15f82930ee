"""Errors that a person can mend: they name the field, the value and the remedy."""


class UserError(Exception):
    """One line for the person who runs the job; the job prints it and exits with code 2."""

    def __init__(self, field: str, problem: str):
        super().__init__(field, problem)  # both, so that it pickles across processes
        self.field, self.problem = field, problem

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}"
