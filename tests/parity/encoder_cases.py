"""Sizes of the small encoders of family_cases.py, as transformers' config classes take them."""

# Encoders: the width of a head is hidden_size / heads, which all of transformers' classes require.
BERT = {
  'model_type': 'bert',
  'vocab_size': 67,
  'hidden_size': 24,
  'intermediate_size': 40,
  'num_hidden_layers': 3,
  'num_attention_heads': 6,
  'max_position_embeddings': 61,
  'type_vocab_size': 2,
  'layer_norm_eps': 1e-5,
  'pad_token_id': None,
}

DISTILBERT = {
  'model_type': 'distilbert',
  'vocab_size': 67,
  'dim': 24,
  'hidden_dim': 40,
  'n_layers': 3,
  'n_heads': 6,
  'max_position_embeddings': 61,
  'pad_token_id': None,
}

ROBERTA = BERT | {'model_type': 'roberta', 'pad_token_id': 3, 'type_vocab_size': 1}

# Windows of 4 on either side, in a row of 48, and a layer type that begins with the window.
MODERNBERT = {
  'model_type': 'modernbert',
  'vocab_size': 67,
  'hidden_size': 24,
  'intermediate_size': 40,
  'num_hidden_layers': 5,
  'num_attention_heads': 6,
  'max_position_embeddings': 61,
  'local_attention': 9,
  'global_attn_every_n_layers': 2,
  'pad_token_id': None,
  'bos_token_id': None,
  'eos_token_id': None,
  'cls_token_id': None,
  'sep_token_id': None,
}

# As v3: 48 positions of which 16 on each side have buckets of their own, the last begins at 40.
DEBERTA = {
  'model_type': 'deberta-v2',
  'vocab_size': 67,
  'hidden_size': 24,
  'intermediate_size': 40,
  'num_hidden_layers': 3,
  'num_attention_heads': 6,
  'max_position_embeddings': 61,
  'type_vocab_size': 0,
  'layer_norm_eps': 1e-5,
  'pad_token_id': None,
  'relative_attention': True,
  'position_buckets': 16,
  'max_relative_positions': 40,
  'norm_rel_ebd': 'layer_norm',
  'share_att_key': True,
  'pos_att_type': ['p2c', 'c2p'],
  'position_biased_input': False,
}

# {name: sizes} of the masked language models.
MASKED = {
  'bert': BERT,
  'bert_untied': BERT
  | {'num_hidden_layers': 2, 'hidden_act': 'gelu_new', 'tie_word_embeddings': False},
  'distilbert': DISTILBERT,
  'roberta': ROBERTA,
  'xlm_roberta': ROBERTA
  | {'model_type': 'xlm-roberta', 'pad_token_id': 1, 'hidden_act': 'gelu_new'},
  'modernbert': MODERNBERT,
  'modernbert_biases': MODERNBERT
  | {
    'num_hidden_layers': 3,
    'norm_bias': True,
    'attention_bias': True,
    'mlp_bias': True,
    'classifier_bias': True,
    'classifier_activation': 'silu',
    'decoder_bias': False,
    'tie_word_embeddings': False,
    'layer_types': ['sliding_attention', 'full_attention', 'sliding_attention'],
    'rope_parameters': {
      'full_attention': {'rope_type': 'default', 'rope_theta': 1000.0},
      'sliding_attention': {'rope_type': 'default', 'rope_theta': 100.0},
    },
  },
  'deberta': DEBERTA,
  # Without buckets, a row is longer than the distances; maps of their own; positions and types too.
  'deberta_v2': DEBERTA
  | {
    'num_hidden_layers': 2,
    'position_buckets': -1,
    'max_relative_positions': 20,
    'norm_rel_ebd': 'none',
    'share_att_key': False,
    'position_biased_input': True,
    'type_vocab_size': 2,
  },
}
