"""Tiny random Transformers models of every architecture that srde is tested on."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
}
SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
KV = {"num_key_value_heads": 2, "head_dim": 8}
MODELS = {
    "llama": SMALL | KV,
    "mistral": SMALL | KV,
    "ministral3": SMALL | KV,
    "qwen2": SMALL | {"num_key_value_heads": 2},
    "qwen3": SMALL | KV,
    "gemma2": SMALL | KV,
    "gemma3_text": SMALL | KV,
    "phi": SMALL,
    "phi3": SMALL,
    "gpt_neox": SMALL,
    "gpt2": {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "vocab_size": 64},
    "opt": SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 16},
}
GATED = {"llama", "mistral", "ministral3", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"}


# SmolLM2's, less the default system turn. It has no {% generation %}.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = ["system user assistant the answer is yes no what how many are there 0 1 2 3 4 5 6 7 8 9\n\n"] * 8
VOCABULARY = 320


def tiny(model_type="llama", seed=0, **settings):
    """A random float32 model in training mode, as Transformers builds it."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **(MODELS[model_type] | SPECIAL | settings))
    return AutoModelForCausalLM.from_config(config)


def tiny_tokenizer(chat_template=CHAT_TEMPLATE):
    """A byte-level BPE of about 300 tokens; any text survives the round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=chat_template,
    )


def save_tiny(folder, model_type="llama", chat_template=CHAT_TEMPLATE, **settings):
    """A tiny model with its tokenizer, as a folder that can be named with --model_name_or_path."""
    tokenizer = tiny_tokenizer(chat_template)
    settings = {"eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 2048} | settings
    model = tiny(model_type, vocab_size=VOCABULARY, **settings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
