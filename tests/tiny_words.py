"""A small tokenizer of word pieces, as BERT's are."""

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

WORDS = ['a', 'good', 'film', 'bad', 'and', 'long', '##er', 'play', '##ing', 'runs', 'in', 'new']
WORDS += ['york', '.']


def word_pieces() -> tokenizers.Tokenizer:
  """A small tokenizer as BERT's: word pieces, [CLS] a [SEP] b [SEP] with token types."""
  vocab = {w: i for i, w in enumerate(['[PAD]', '[UNK]', '[CLS]', '[SEP]', *WORDS])}
  found = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token='[UNK]'))
  found.normalizer = normalizers.BertNormalizer(lowercase=True)
  found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  found.post_processor = processors.BertProcessing(('[SEP]', 3), ('[CLS]', 2))
  return found


def files(library: tokenizers.Tokenizer | None = None) -> dict[str, bytes]:
  """The files of a tokenizer folder."""
  library = library or word_pieces()
  return {'tokenizer.json': library.to_str().encode(), 'tokenizer_config.json': b'{}'}
