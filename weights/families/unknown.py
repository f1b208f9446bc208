"""Keys of a config that nothing reads: those that may change the model are refused."""

import re

from weights.families.defaults import READ_BY_SOME
from weights.families.family import Family
from weights.files import Config

# keys that change no number: words about the file, training and generation, and what is true of a whole family
WITHOUT_EFFECT = re.compile(
    r"_.*|.*token(_id|_ids|izer|izer_class)|.*(dropout|pdrop|version|jitter_noise|_coef|_penalty|_ids)|init(ializer\w*|_std)"
    r"|(transformers|unsloth|output|return|router|num_return|forced|suppress|id2|label)\W?\w*|architectures|auto_map"
    r"|model_type|intermediate_size|(bos|eos|pad|unk|sep|mask)_token|(\w+_)?(max|min|seq|sequence)_length|n_ctx"
    r"|gradient_checkpointing|(use_)?(flash_attn|attn_implementation)\w*|(anyres|vit|image|vision|video|audio)_\w+"
    r"|(torch_)?dtype|use_cache|cache_implementation|(tie|is)_(encoder_)?decoder|is_llama_config|pretraining_tp|prefix"
    r"|num_(labels|beams|beam_groups|nextn_predict_layers|mtp_layers)|mtp_\w+|mamba_ssm_dtype"
    r"|do_sample|early_stopping|typical_p"
    r"|temperature|top_[kp]|(encoder_)?no_repeat_ngram_size|remove_invalid_values|finetuning_task|problem_type"
    r"|task_specific_params|pruned_heads|chunk_size_feed_forward|torchscript|use_bfloat16|neftune_noise_alpha|hidden_act"
    r"|rope_(theta|scaling|parameters|local_base_freq)|use_(gated_activation|rotary_pos_emb|qk_norm|embedding_sharing)"
    r"|qk_head_dim|aux_loss_alpha|seq_aux|embedding_initializer_range"
    r"|use_parallel_(block|embedding)|position_embedding_type|order_of_interleaved_layers|layer_switch|norm_type|pool_type"
    r"|attention_head_dim|org_vocab_size|cla_share_factor|dense_list|(pad|mask_init|(im|text)_(start|end))_id"
    r"|block_norm_eps|(block|conv)_(use_xavier_init|\w+_init_scale)"
    r"|enable_lm_head_fp32|initial_context_length|experts_per_token|(quantization|compression)_config"
)


def refuse_unknown(given: dict, config: Config, family: Family) -> None:
    """Refuse a key that might change the model and that nothing here reads; as off count null, false, 0, 1 and empty.

    given: the keys of the file.
    """
    for key, value in given.items():
        is_off = (
            value is None or value is False or value in ("", [], {}) or (type(value) is not bool and value in (0, 1))
        )
        known = key in config.read or key in family.defaults or key in READ_BY_SOME or WITHOUT_EFFECT.fullmatch(key)
        if not known and not is_off:
            raise config.error(f"{key} is {value!r}, which is not known here; if it changes nothing, take it out")
