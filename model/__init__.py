"""Networks and losses: teachers, mixers, the student, transplant, objectives, export."""

from radlads.model.mixers.shared.registry import list_variants, validate_options

__all__ = ["list_variants", "validate_options"]
