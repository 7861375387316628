"""The model `ftjax` of lm-eval's command line: what --model_args may hold, and a run to its end."""

import json
import sys

import pytest
import yaml
from tiny_model import write_folder

from ftjax.runtime.errors import ConfigError, DataError

pytest.importorskip('lm_eval')

from lm_eval.api.registry import get_model

from ftjax import lm_eval as entry
from ftjax.serving import lm_eval_registration
from ftjax.serving.lm_eval_registration import FtjaxModel


def test_lm_eval_finds_the_model_and_makes_it_from_its_arguments(tmp_path):
  lm_eval_registration.register()
  lm_eval_registration.register()
  assert get_model('ftjax') is FtjaxModel
  path = write_folder(tmp_path / 'model')
  more = {'batch_size': 'auto', 'max_batch_size': None, 'device': 'cuda:0'}
  made = FtjaxModel.create_from_arg_string(f'path={path},max_length=64', more)
  assert (made.max_length, made.batch_size, made.max_gen_toks) == (64, 8, 256)
  assert len(made.tok_encode('ab')) == 2  # a token a byte, and no BOS
  assert made.rank == 0 and made.world_size == 1


@pytest.mark.parametrize(
  ('text', 'batch_size', 'expected'),
  [
    ('pth=x', 1, r'pth=.*expected one of path'),
    ('dtype=float32', 1, 'path=DIR_OR_WORKDIR is missing'),
    ('path=x,dtype=int8', 1, 'dtype=int8'),
    ('path=x,max_length=many', 1, "max_length='many'"),
    ('path=x', 0, 'batch_size=0'),
    ('path=x', 'few', 'batch_size=few'),
  ],
)
def test_arguments_that_are_no_such(text, batch_size, expected):
  with pytest.raises(ConfigError, match=expected):
    FtjaxModel.create_from_arg_string(text, {'batch_size': batch_size})


def test_a_model_that_is_not_there(tmp_path):
  with pytest.raises(DataError):
    FtjaxModel.create_from_arg_obj({'path': str(tmp_path / 'nowhere')})


def test_bos_of_a_tokenizer_that_has_none(tmp_path):
  path = write_folder(tmp_path / 'model')
  with pytest.raises(ConfigError, match='has no BOS'):
    FtjaxModel.create_from_arg_obj({'path': path, 'add_bos_token': True})


def test_more_tokens_than_the_model_was_made_for(tmp_path):
  path = write_folder(tmp_path / 'model')
  with pytest.raises(ConfigError, match=r'max_length=9999.*512'):
    FtjaxModel.create_from_arg_obj({'path': path, 'max_length': 9999})


@pytest.mark.full
def test_the_command_line_to_its_end(tmp_path, monkeypatch):
  path = write_folder(tmp_path / 'model')
  rows = tmp_path / 'rows.jsonl'
  rows.write_text(''.join(json.dumps({'q': f'{i} =', 'a': str(i)}) + '\n' for i in range(3)))
  shared = {
    'dataset_path': 'json',
    'dataset_kwargs': {'data_files': {'test': str(rows)}},
    'test_split': 'test',
    'doc_to_text': '{{q}}',
    'doc_to_target': 'a',
  }
  kinds = {
    'chosen': {'output_type': 'multiple_choice', 'doc_to_choice': ['0', '1', '2']},
    'written': {
      'output_type': 'generate_until',
      'generation_kwargs': {'until': ['.'], 'max_gen_toks': 4},
      'metric_list': [{'metric': 'exact_match'}],
    },
  }
  folder = tmp_path / 'tasks'
  folder.mkdir()
  for name, own in kinds.items():
    (folder / f'{name}.yaml').write_text(yaml.safe_dump({'task': name} | shared | own))
  monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
  words = f'lm_eval run --model ftjax --model_args path={path} --batch_size 2 --log_samples'
  words += f' --include_path {folder} --output_path {tmp_path / "out"} --tasks {" ".join(kinds)}'
  monkeypatch.setattr(sys, 'argv', words.split())
  entry.main()
  (written,) = (tmp_path / 'out').rglob('results_*.json')
  found = json.loads(written.read_text())
  assert set(found['results']) == set(kinds)
  assert found['n-samples'] == {k: {'original': 3, 'effective': 3} for k in kinds}
  assert len(list((tmp_path / 'out').rglob('samples_*.jsonl'))) == 2
