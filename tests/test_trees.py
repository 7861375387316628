"""Names of leaves, and regex tables that must cover them."""

import pytest

from ftjax.runtime import trees
from ftjax.runtime.errors import ConfigError

TREE = {'stack0': {'block0': {'attn': {'q': 1, 'k': 2}, 'norm': 3}}, 'embed': {'w': 4}}
FLAT = {
  'embed/w': 4,
  'stack0/block0/attn/k': 2,
  'stack0/block0/attn/q': 1,
  'stack0/block0/norm': 3,
}


def test_flatten_and_back():
  assert trees.flatten(TREE) == FLAT
  assert trees.unflatten(FLAT) == TREE
  assert trees.unflatten(trees.flatten({})) == {}


def test_flatten_does_not_depend_on_insertion_order():
  shuffled = {'embed': TREE['embed'], 'stack0': {'block0': {'norm': 3, 'attn': {'k': 2, 'q': 1}}}}
  assert list(trees.flatten(shuffled)) == list(trees.flatten(TREE)) == sorted(FLAT)


def test_map_named_gives_names_and_all_leaves():
  seen = trees.map_named(lambda n, a, b: (n, a + b), TREE, TREE)
  assert trees.flatten(seen) == {n: (n, 2 * v) for n, v in FLAT.items()}


def test_select_and_merge_are_inverse():
  kept, others = trees.select(TREE, lambda n: 'attn' in n)
  assert trees.flatten(kept).keys() == {'stack0/block0/attn/q', 'stack0/block0/attn/k'}
  assert trees.merge(kept, others) == trees.merge(others, kept) == TREE


def test_merge_refuses_what_is_in_both():
  with pytest.raises(ValueError, match='embed/w'):
    trees.merge(TREE, {'embed': {'w': 5}})


def test_the_first_row_that_matches_the_whole_name_decides():
  table = [('.*/attn/.*', 'a'), ('stack0/.*', 'b'), ('.*', 'c')]
  found = trees.match_table(table, FLAT, 'optim.decay')
  assert found == {
    'embed/w': 'c',
    'stack0/block0/attn/k': 'a',
    'stack0/block0/attn/q': 'a',
    'stack0/block0/norm': 'b',
  }


def test_half_a_name_does_not_match():
  with pytest.raises(ConfigError, match=r'optim\.decay.*embed'):
    trees.match_table([('embed', 1), ('stack0/.*', 2)], FLAT, 'optim.decay')


def test_a_table_that_does_not_cover_names_what_it_leaves_out():
  with pytest.raises(ConfigError, match=r'stack0/block0/attn/k.*3 of 4') as error:
    trees.match_table([('embed/w', 1)], FLAT, 'optim.freeze')
  assert error.value.exit_code == 2 and 'optim.freeze' in str(error.value)


def test_a_row_that_decides_nothing_is_an_error():
  with pytest.raises(ConfigError, match='embeds/w'):
    trees.match_table([('embeds/w', 1), ('.*', 2)], FLAT, 'optim.freeze')


def test_a_row_hidden_by_an_earlier_one_is_an_error():
  with pytest.raises(ConfigError, match='attn'):
    trees.match_table([('stack0/.*', 1), ('.*/attn/.*', 2), ('.*', 3)], FLAT, 'optim.freeze')


def test_the_last_row_may_decide_nothing():
  assert trees.match_table([('stack0/.*', 1), ('embed/w', 2), ('.*', 3)], FLAT, 'k')['embed/w'] == 2


def test_a_broken_regex_names_the_key():
  with pytest.raises(ConfigError, match=r'optim\.freeze'):
    trees.match_table([('stack0/(', 1), ('.*', 2)], FLAT, 'optim.freeze')
