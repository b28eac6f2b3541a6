"""Reading a foreign config as if it were hostile: every field with its type, its bounds and its default.

What we implement is read; what must have a certain value for our mathematics to hold is asserted (`only`);
what cannot matter is named in HARMLESS.  A field that is none of these, with a value that could switch
something on, is refused by name: the difference between a clear message and fluent wrong text.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from tiercel.errors import FormatError, UnsupportedError
from tiercel.mixers.checks import MAX_LAYERS, MAX_SIZE

REQUIRED: Any = object()

# Fields of any config.json that do not touch the forward pass: bookkeeping, tokenizers, training, generation.
HARMLESS = frozenset(
    """adam_beta1 adam_beta2 adam_epsilon add_bos_token add_eos_token apex assistant_confidence_threshold
    assistant_early_exit assistant_lookbehind attention_probs_dropout_prob attn_dropout attn_pdrop bf16 bos_token
    cache_config cache_implementation chat_template classifier_dropout clean_up_tokenization_spaces compile_config
    constraints dola_layers embd_pdrop eos_token encoder_repetition_penalty epsilon_cutoff eta_cutoff ffn_dropout
    flash_attention force_words_ids fp16 gradient_accumulation_steps gradient_checkpointing
    gradient_checkpointing_kwargs guidance_scale hidden_dropout_prob label_smoothing label_smoothing_factor
    learning_rate legacy lora_alpha lora_dropout lora_r low_memory lr_scheduler_type mask_token mask_token_id
    max_grad_norm max_matching_ngram_size max_new_tokens max_time min_new_tokens min_p mlp_dropout model_parallel
    num_assistant_tokens num_assistant_tokens_schedule num_train_epochs output_logits padding_side pad_token
    pad_to_multiple_of penalty_alpha per_device_train_batch_size prompt_lookup_num_tokens renormalize_logits
    return_legacy_cache seed sep_token sequence_bias stop_strings summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj target_lookbehind_tokens tokenizer_model_max_length
    tokenizer_padding_side tokenizer_truncation_side token_healing torch_compile trainer_state train_batch_size
    trust_remote_code truncation_side unk_token use_flash_attention use_flash_attention_2 use_flash_attn_2 use_fp16
    use_bf16 use_reentrant use_sdpa warmup_ratio warmup_steps watermarking_config weight_decay
    _name_or_path _attn_implementation _attn_implementation_autoset _commit_hash add_cross_attention
    architectures attention_dropout attn_implementation auto_map bad_words_ids begin_suppress_tokens
    bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample dtype early_stopping embedding_dropout encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id hidden_dropout
    id2label initializer_range is_decoder is_encoder_decoder label2id layer_norm_eps length_penalty max_length
    min_length model_type name no_repeat_ngram_size num_beam_groups num_beams num_labels num_logits_to_keep
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp
    problem_type pruned_heads remove_invalid_values repetition_penalty rescale_prenorm_residual resid_dropout
    return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers_version
    typical_p unk_token_id use_bfloat16 use_cache use_mambapy use_mamba_kernels use_associative_scan 
    vocab_file is_llama_config transformers.js_config unsloth_version unsloth_fixed seq_length model_max_length
    max_sequence_length neftune_noise_alpha use_flash_attn generation_config license tags""".split()
)


class Fields:
    """The fields of one config.json; `done()` refuses those that were not read."""

    def __init__(self, data: Any, where: str = "config.json") -> None:
        if not isinstance(data, dict):
            raise FormatError(f"{where} must be a table of fields, not {type(data).__name__}")
        self.data, self.where = data, where
        self.seen: set[str] = set()

    def _get(self, name: str, default: Any) -> Any:
        self.seen.add(name)
        value = self.data.get(name)
        if value is None:
            if default is REQUIRED:
                raise FormatError(f"{self.where}: the field {name!r} is missing")
            return default
        return value

    def size(self, name: str, default: Any = REQUIRED, *, largest: int = MAX_SIZE - 1) -> int:
        """A whole number from 1 to `largest`."""
        value = self._get(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not 0 < value <= largest:
            raise FormatError(f"{self.where}: {name} must be a whole number from 1 to {largest}, not {_short(value)}")
        return value

    def layers(self, default: Any = REQUIRED) -> int:
        """The number of layers, 1 to MAX_LAYERS."""
        return self.size("num_hidden_layers", default, largest=MAX_LAYERS)

    def layer_types(self, depth: int, known: Collection[str]) -> list[str] | None:
        """The kind of every layer, one of `known`; None where the file is silent."""
        types = self._get("layer_types", None)
        if types is None:
            return None
        if (
            not isinstance(types, list)
            or len(types) != depth
            or not all(isinstance(t, str) and t in known for t in types)
        ):
            *others, last = known
            raise UnsupportedError(
                f"{self.where}: layer_types must name {', '.join(others)} or {last} for each of {depth} layers"
            )
        return types

    def size_or_none(self, name: str, default: int | None = None) -> int | None:
        """A whole number from 1, or nothing: null, or absent without a default."""
        return None if self.data.get(name, default) is None else self.size(name, default)

    def count(self, name: str, default: Any = REQUIRED) -> int:
        """A whole number from 0: an index, an offset."""
        value = self._get(name, default)
        if type(value) is not int or not 0 <= value < MAX_SIZE:
            raise FormatError(f"{self.where}: {name} must be a whole number from 0, not {_short(value)}")
        return value

    def number(self, name: str, default: Any = REQUIRED, *, positive: bool = False) -> float:
        """A finite number."""
        return self._number(name, self._get(name, default), positive)

    def _number(self, name: str, value: Any, positive: bool) -> float:
        ok = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
        if not ok or not math.isfinite(value) or (positive and value <= 0):
            kind = "a positive number" if positive else "a finite number"
            raise FormatError(f"{self.where}: {name} must be {kind}, not {_short(value)}")
        return float(value)

    def multiplier(self, name: str) -> float:
        """A finite number other than zero, 1 by default: it is folded into weights and unfolded again."""
        value = self.number(name, 1.0)
        if value == 0:
            raise FormatError(f"{self.where}: {name} must not be zero")
        return value

    def multipliers(self, name: str, length: int) -> list[float]:
        values = self._get(name, [1.0] * length)
        if not isinstance(values, (list, tuple)) or len(values) != length:
            raise FormatError(f"{self.where}: {name} must be a list of {length} numbers, not {_short(values)}")
        return [Fields({name: value}, self.where).multiplier(name) for value in values]

    def numbers(self, name: str, default: Any = REQUIRED) -> tuple[float, ...]:
        values = self._get(name, default)
        if not isinstance(values, (list, tuple)) or len(values) > 1 << 16:
            raise FormatError(f"{self.where}: {name} must be a list of numbers, not {_short(values)}")
        return tuple(self._number(name, value, False) for value in values)

    def flag(self, name: str, default: Any = REQUIRED) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise FormatError(f"{self.where}: {name} must be true or false, not {_short(value)}")
        return value

    def limits(self, name: str) -> tuple[float, float]:
        """Two numbers, low and high; high may be infinite in any of the spellings files use."""
        value = self._get(name, (0.0, math.inf))
        if isinstance(value, (list, tuple)) and len(value) == 2:
            low, high = (math.inf if v in ("inf", "Infinity", "float('inf')") else v for v in value)
            if high is None or (isinstance(high, dict) and high.get("__float__") == "Infinity"):
                high = math.inf
            if all(isinstance(v, (int, float)) and not isinstance(v, bool) and v == v for v in (low, high)):
                return float(low), float(high)
        raise FormatError(f"{self.where}: {name} must be two numbers, not {_short(value)}")

    def indices(self, name: str, below: int) -> frozenset[int]:
        """A list of layer numbers; none when absent."""
        values = self._get(name, [])
        ok = isinstance(values, (list, tuple)) and all(type(v) is int and 0 <= v < below for v in values)
        if not ok:
            raise FormatError(f"{self.where}: {name} must list layers 0 to {below - 1}, not {_short(values)}")
        return frozenset(values)

    def choice(self, name: str, default: str, allowed: dict[str, str]) -> str:
        """A word that must be one of the allowed ones; answers ours for it."""
        value = self._get(name, default)
        if not isinstance(value, str) or value not in allowed:
            known = ", ".join(allowed)
            raise UnsupportedError(f"{self.where}: {name} = {_short(value)} is not supported; known: {known}")
        return allowed[value]

    def only(self, name: str, *allowed: Any) -> None:
        """Must be absent, null, or one of these."""
        value = self._get(name, allowed[0])
        if not any(value == a and type(value) is type(a) for a in allowed):
            known = " or ".join(map(repr, allowed))
            raise UnsupportedError(f"{self.where}: {name} = {_short(value)} is not supported, only {known}")

    def table(self, name: str) -> Fields | None:
        """A nested table, or None."""
        value = self._get(name, None)
        return None if value is None else Fields(value, f"{self.where}: {name}")

    def ignore(self, *names: str) -> None:
        """Fields of this family that do not touch the forward pass."""
        self.seen.update(names)

    def done(self) -> None:
        """Refuse fields that were not read, unless they are harmless or switched off."""
        for name, value in self.data.items():
            off = value is None or value is False or (isinstance(value, (list, dict, str)) and not value)
            if name not in self.seen and name not in HARMLESS and not str(name).startswith("_") and not off:
                raise UnsupportedError(
                    f"{self.where}: {name} = {_short(value)} is not known here and may change the result; "
                    "remove the field if it does not"
                )


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # thousands of digits
        return f"a {type(value).__name__} with a very long number"
    return text if len(text) <= 60 else text[:57] + "..."
