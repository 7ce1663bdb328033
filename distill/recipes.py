"""The distillation recipes: the rows of the paper's Table 1, as choices of the other modules."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Recipe:
    """Every choice of the method that the paper compares.

    Attributes:
        name: what the command line calls it.
        standardize: teachers' features: "exact" statistics, "ema" or "none" (Sec. 3.3).
        dedicated: projectors of their own for CLS and patch tokens (Sec. 3.3).
        ladder: projectors after every block, not only after the last (Eq. 3).
        drop: probability p of teacher dropping (Eq. 4); 0 sums all teachers.
        reduce: CLS and patch loss, "sum" (Eq. 2) or "mean".
        normalise: "paper" or "reference", see `balancing.aggregate`.
        hidden: "paper" or "reference", see `projectors.hidden_widths`.
        first_only: protect only the first of equal losses, see `balancing.teacher_dropping`.
        summary: what it is in the paper.
        cost: forward cost of the projectors, per ViT-B teacher.
    """

    name: str
    standardize: str
    dedicated: bool
    ladder: bool
    drop: float
    reduce: str = "sum"
    normalise: str = "paper"
    hidden: str = "paper"
    first_only: bool = False
    summary: str = ""
    cost: str = ""


# Multiply-adds for 197 tokens of a ViT-B/16 at 224 px, whose own forward is 17.6 G.
_HEAD = "0.93 G multiply-adds a teacher, 0.05 of a ViT-B/16 forward"
_LADDER = "3.49 G multiply-adds a teacher, 0.20 of a ViT-B/16 forward"

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "basic",
            standardize="none",
            dedicated=False,
            ladder=False,
            drop=0.0,
            summary="raw features, one projector a teacher (Table 1, row 4)",
            cost=_HEAD,
        ),
        Recipe(
            "std",
            standardize="exact",
            dedicated=False,
            ladder=False,
            drop=0.0,
            summary="basic + standardized features (Table 1, row 5)",
            cost=_HEAD,
        ),
        Recipe(
            "dedicated",
            standardize="exact",
            dedicated=True,
            ladder=False,
            drop=0.0,
            summary="std + projectors of their own for CLS and patch tokens (Table 1, row 6)",
            cost=_HEAD,
        ),
        Recipe(
            "ladder",
            standardize="exact",
            dedicated=True,
            ladder=True,
            drop=0.0,
            summary="dedicated + ladder of projectors (Table 1, row 7)",
            cost=_LADDER,
        ),
        Recipe(
            "unic",
            standardize="exact",
            dedicated=True,
            ladder=True,
            drop=0.5,
            summary="ladder + teacher dropping: the whole method (Table 1, row 8)",
            cost=_LADDER,
        ),
        Recipe(
            "single",
            standardize="exact",
            dedicated=True,
            ladder=False,
            drop=0.0,
            summary="dedicated with one teacher only (Sec. 3.3, DeiT-III alone)",
            cost=_HEAD,
        ),
    )
}


def reference(recipe: Recipe) -> Recipe:
    """Give the recipe with every choice in which the authors' code differs from the paper.

    Mean instead of sum of CLS and patch loss, division by the sum of coefficients, running instead
    of exact statistics, only the first of equal losses protected, hidden widths 768 and 3072.
    """
    return replace(
        recipe,
        standardize="none" if recipe.standardize == "none" else "ema",
        reduce="mean",
        normalise="reference",
        hidden="reference",
        first_only=True,
    )


def resolve(
    name: str,
    use_reference: bool = False,
    *,
    drop: float | None = None,
    teachers: int | None = None,
) -> Recipe:
    """Find a recipe by name.

    Args:
        name: a key of `RECIPES`.
        use_reference: apply `reference`.
        drop: another probability of teacher dropping (0.25 for large teachers).
        teachers: how many there are, to check against the recipe.

    Raises:
        ValueError: if there is no such recipe, p lies outside [0, 1], or "single" is asked for
            with several teachers.
    """
    if name not in RECIPES:
        listed = "".join(f"\n  {r.name:<10} {r.summary}" for r in RECIPES.values())
        raise ValueError(f"no recipe {name!r}; choose one of{listed}")
    recipe = RECIPES[name]
    if drop is not None:
        if not 0 <= drop <= 1:
            raise ValueError(f"the probability of dropping a teacher is in [0, 1], got {drop}")
        recipe = replace(recipe, drop=drop)
    if name == "single" and teachers not in (None, 1):
        raise ValueError(f"recipe 'single' takes one teacher, got {teachers}; name one of them")
    return reference(recipe) if use_reference else recipe
