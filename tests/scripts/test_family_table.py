"""README's table of families."""

from scripts.families import BLOCK, README, table


def test_the_table_in_the_readme_is_up_to_date():
    """`python scripts/families.py` writes it."""
    assert BLOCK.search(README.read_text(encoding="utf-8"))[0] == table()
