"""Batches from the thread: in order, on the devices, a few ahead, and no thread left behind."""

import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ftjax.training.prefetch import Prefetch, local_rows, place


def make(step):
  return {'tokens': np.full((2, 4), step, np.int32)}


class Stream:
  """Batches of two rows, from a function of the step."""

  def __init__(self, make=make):
    self._make = make

  def batch(self, step, rows):
    assert sorted(rows) == [0, 1]
    return self._make(step)


def abstract():
  """Two micro-batches of one row."""
  where = NamedSharding(jax.sharding.get_mesh(), P())
  return {'tokens': jax.ShapeDtypeStruct((2, 1, 4), np.int32, sharding=where)}


def threads():
  return [t for t in threading.enumerate() if t.name == 'prefetch']


def test_steps_in_order_from_start_to_stop():
  prefetch = Prefetch(Stream(), abstract(), 3, 7)
  for step in (3, 4, 5, 6):
    device = prefetch.take(step)
    assert isinstance(device['tokens'], jax.Array)
    np.testing.assert_array_equal(device['tokens'], make(step)['tokens'].reshape(2, 1, 4))
  prefetch.close()
  assert not threads()


def test_nothing_to_do_ends_at_once():
  with pytest.raises(ValueError, match='up to 5 were taken'):
    Prefetch(Stream(), abstract(), 5, 5).take(5)
  prefetch = Prefetch(Stream(), abstract(), 0, 5)
  with pytest.raises(ValueError, match='step 3 was asked for, the next one is 0'):
    prefetch.take(3)
  prefetch.close()


def test_rows_are_sharded(use_mesh):
  mesh = use_mesh(fsdp=2)
  where = {'tokens': NamedSharding(mesh, P('fsdp'))}
  placed = place({'tokens': np.arange(8).reshape(2, 4)}, where)['tokens']
  assert placed.sharding == where['tokens']
  assert [s.data.shape for s in placed.addressable_shards] == [(1, 4), (1, 4)]
  np.testing.assert_array_equal(placed, np.arange(8).reshape(2, 4))


def test_only_a_few_are_made_ahead():
  made = []

  def count(step):
    made.append(step)
    return make(step)

  prefetch = Prefetch(Stream(count), abstract(), 0, 100, ahead=2)
  time.sleep(0.5)
  assert len(made) <= 3  # two in the queue, one in hand
  for i in range(5):
    prefetch.take(i)
  time.sleep(0.5)
  assert 5 <= len(made) <= 8
  prefetch.close()


def test_an_error_while_making_a_batch_reaches_the_loop():
  def fail(step):
    if step == 2:
      raise ValueError('row 17 is broken')
    return make(step)

  prefetch = Prefetch(Stream(fail), abstract(), 0, 5)
  seen = []
  with pytest.raises(ValueError, match='row 17'):
    for step in range(5):
      prefetch.take(step)
      seen.append(step)
  assert seen == [0, 1]
  prefetch.close()
  assert not threads()


def test_close_ends_a_thread_that_waits():
  prefetch = Prefetch(Stream(), abstract(), 0, 1000)
  prefetch.take(0)
  begin = time.monotonic()
  prefetch.close()
  assert time.monotonic() - begin < 5 and not threads()


def test_prefetch_holds_no_state_of_its_own():
  """Started in the middle it gives what one from the beginning gives there."""
  whole, late = Prefetch(Stream(), abstract(), 0, 6), Prefetch(Stream(), abstract(), 4, 6)
  expected = [whole.take(step)['tokens'] for step in range(6)]
  for step in (4, 5):
    np.testing.assert_array_equal(late.take(step)['tokens'], expected[step])


def test_rows_of_a_process_are_those_of_its_devices(use_mesh):
  """All devices are of this process here: every row is, along whichever axis."""
  where = NamedSharding(use_mesh(fsdp=4), P(None, 'fsdp'))
  assert local_rows(where, (2, 8, 4), 1) == set(range(8))
  assert local_rows(where, (2, 8, 4), 0) == {0, 1}
