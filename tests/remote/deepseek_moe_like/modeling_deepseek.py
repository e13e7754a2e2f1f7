"""A look-alike of DeepSeek-MoE-16B's remote code: its structure, names and imports of early 2024.

Written for the tests. It keeps what makes the real file hard: names that transformers has dropped,
caches as tuples, rotary buffers that no checkpoint holds, experts in a `ModuleList` that are run
without gradients and added up in place, and an auxiliary loss in training mode.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_attn_mask_utils import (
    AttentionMaskConverter,
    _prepare_4d_attention_mask,
    _prepare_4d_causal_attention_mask,
    _prepare_4d_causal_attention_mask_for_sdpa,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS, is_torch_greater_or_equal_than_1_13
from transformers.utils import (
    add_start_docstrings,
    add_start_docstrings_to_model_forward,
    is_flash_attn_2_available,
    logging,
    replace_return_docstrings,
)
from transformers.utils.import_utils import is_torch_fx_available

from .configuration_deepseek import DeepseekConfig

if is_flash_attn_2_available():
    from flash_attn import flash_attn_func  # noqa: F401

if is_torch_fx_available():
    if not is_torch_greater_or_equal_than_1_13:
        import torch.fx
    _prepare_4d_causal_attention_mask = torch.fx.wrap(_prepare_4d_causal_attention_mask)

logger = logging.get_logger(__name__)


def _make_causal_mask(shape, dtype, past=0):
    return AttentionMaskConverter._make_causal_mask(shape, dtype, past_key_values_length=past)


def _expand_mask(mask, dtype, length=None):
    return _prepare_4d_attention_mask(mask, dtype, tgt_len=length)


class DeepseekRMSNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        wide = hidden_states.to(torch.float32)
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (wide * scale).to(hidden_states.dtype)


ALL_LAYERNORM_LAYERS.append(DeepseekRMSNorm)


class DeepseekRotaryEmbedding(nn.Module):
    def __init__(self, dim, max_position_embeddings=2048, base=10000, scaling_factor=1.0):
        super().__init__()
        self.scaling_factor = scaling_factor
        inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2).float() / dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self._fill(max_position_embeddings, inv_freq.device, torch.get_default_dtype())
        self.max_seq_len_cached = None

    def _fill(self, length, device, dtype):
        self.max_seq_len_cached = length
        t = torch.arange(length, device=device, dtype=self.inv_freq.dtype) / self.scaling_factor
        angles = torch.outer(t, self.inv_freq.to(device))
        both = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos_cached", both.cos().to(dtype), persistent=False)
        self.register_buffer("sin_cached", both.sin().to(dtype), persistent=False)

    def forward(self, x, seq_len):
        if self.max_seq_len_cached is None or seq_len > self.max_seq_len_cached:
            self._fill(seq_len, x.device, x.dtype)
        return self.cos_cached[:seq_len].to(x.dtype), self.sin_cached[:seq_len].to(x.dtype)


def rotate(states, cos, sin, position_ids):
    cos, sin = cos[position_ids].unsqueeze(1), sin[position_ids].unsqueeze(1)
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


class DeepseekMLP(nn.Module):
    def __init__(self, config, hidden_size=None, intermediate_size=None):
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size or config.hidden_size
        self.intermediate_size = intermediate_size or config.intermediate_size
        self.gate_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=False)
        self.up_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=False)
        self.down_proj = nn.Linear(self.intermediate_size, self.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x):
        if self.config.pretraining_tp > 1:
            size = self.intermediate_size // self.config.pretraining_tp
            gates = self.gate_proj.weight.split(size, dim=0)
            ups = self.up_proj.weight.split(size, dim=0)
            downs = self.down_proj.weight.split(size, dim=1)
            return sum(
                F.linear(self.act_fn(F.linear(x, gate)) * F.linear(x, up), down)
                for gate, up, down in zip(gates, ups, downs, strict=True)
            )
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class MoEGate(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.n_routed_experts = config.n_routed_experts
        self.scoring_func = config.scoring_func
        self.alpha = config.aux_loss_alpha
        self.seq_aux = config.seq_aux
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty((self.n_routed_experts, config.hidden_size)))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, hidden_states):
        bsz, seq_len, h = hidden_states.shape
        logits = F.linear(hidden_states.view(-1, h), self.weight, None)
        if self.scoring_func != "softmax":
            raise NotImplementedError(self.scoring_func)
        scores = logits.softmax(dim=-1)
        topk_weight, topk_idx = torch.topk(scores, k=self.top_k, dim=-1, sorted=False)
        if self.top_k > 1 and self.norm_topk_prob:
            topk_weight = topk_weight / (topk_weight.sum(dim=-1, keepdim=True) + 1e-20)
        aux_loss = None
        if self.training and self.alpha > 0.0:
            chosen = F.one_hot(topk_idx.view(bsz, -1), self.n_routed_experts).float()
            load = chosen.mean(1) * self.n_routed_experts
            aux_loss = (load * scores.view(bsz, seq_len, -1).mean(1)).sum(1).mean() * self.alpha
        return topk_idx, topk_weight, aux_loss


class AddAuxiliaryLoss(torch.autograd.Function):
    """Passes x on; in the backward pass the auxiliary loss gets the gradient 1."""

    @staticmethod
    def forward(ctx, x, loss):
        assert loss.numel() == 1
        ctx.dtype, ctx.required = loss.dtype, loss.requires_grad
        return x

    @staticmethod
    def backward(ctx, grad_output):
        one = torch.ones(1, dtype=ctx.dtype, device=grad_output.device)
        return grad_output, one.squeeze() if ctx.required else None


class DeepseekMoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.num_experts_per_tok = config.num_experts_per_tok
        self.experts = nn.ModuleList(
            [
                DeepseekMLP(config, intermediate_size=config.moe_intermediate_size)
                for _ in range(config.n_routed_experts)
            ]
        )
        self.gate = MoEGate(config)
        if config.n_shared_experts is not None:
            size = config.moe_intermediate_size * config.n_shared_experts
            self.shared_experts = DeepseekMLP(config, intermediate_size=size)

    def forward(self, hidden_states):
        identity, shape = hidden_states, hidden_states.shape
        topk_idx, topk_weight, aux_loss = self.gate(hidden_states)
        hidden_states = hidden_states.view(-1, shape[-1])
        flat = topk_idx.view(-1)
        if self.training:
            repeated = hidden_states.repeat_interleave(self.num_experts_per_tok, dim=0)
            y = torch.empty_like(repeated)
            for i, expert in enumerate(self.experts):
                y[flat == i] = expert(repeated[flat == i])
            y = (y.view(*topk_weight.shape, -1) * topk_weight.unsqueeze(-1)).sum(dim=1)
            y = AddAuxiliaryLoss.apply(y.view(*shape), aux_loss)
        else:
            y = self.moe_infer(hidden_states, flat, topk_weight.view(-1, 1)).view(*shape)
        if self.config.n_shared_experts is not None:
            y = y + self.shared_experts(identity)
        return y

    @torch.no_grad()
    def moe_infer(self, x, flat_expert_indices, flat_expert_weights):
        total = torch.zeros_like(x)
        order = flat_expert_indices.argsort()
        ends = flat_expert_indices.bincount().cpu().numpy().cumsum(0)
        tokens = order // self.num_experts_per_tok
        for i, end in enumerate(ends):
            start = 0 if i == 0 else ends[i - 1]
            if start == end:
                continue
            expert = self.experts[i]
            own = tokens[start:end]
            out = expert(x[own])
            out.mul_(flat_expert_weights[order[start:end]])
            total.scatter_reduce_(0, own.view(-1, 1).repeat(1, x.shape[-1]), out, reduce="sum")
        return total


class DeepseekAttention(nn.Module):
    def __init__(self, config, layer_idx=None):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        hidden, self.num_heads = config.hidden_size, config.num_attention_heads
        self.head_dim = hidden // self.num_heads
        self.groups = self.num_heads // config.num_key_value_heads
        narrow = config.num_key_value_heads * self.head_dim
        self.is_causal = True
        self.q_proj = nn.Linear(hidden, hidden, bias=config.attention_bias)
        self.k_proj = nn.Linear(hidden, narrow, bias=config.attention_bias)
        self.v_proj = nn.Linear(hidden, narrow, bias=config.attention_bias)
        self.o_proj = nn.Linear(hidden, hidden, bias=config.attention_bias)
        self._init_rope()

    def _init_rope(self):
        options = {
            "max_position_embeddings": self.config.max_position_embeddings,
            "base": self.config.rope_theta,
        }
        if self.config.rope_scaling is not None:
            if self.config.rope_scaling["type"] != "linear":
                raise ValueError(f"unknown scaling {self.config.rope_scaling['type']}")
            options["scaling_factor"] = self.config.rope_scaling["factor"]
        self.rotary_emb = DeepseekRotaryEmbedding(self.head_dim, **options)

    def heads(self, states):
        return states.view(*states.shape[:2], -1, self.head_dim).transpose(1, 2)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        past_key_value=None,
        output_attentions=False,
        use_cache=False,
        **kwargs,
    ):
        query = self.heads(self.q_proj(hidden_states))
        key = self.heads(self.k_proj(hidden_states))
        value = self.heads(self.v_proj(hidden_states))
        length = key.shape[-2]
        if past_key_value is not None:
            length += past_key_value.get_usable_length(length, self.layer_idx)
        cos, sin = self.rotary_emb(value, seq_len=length)
        query, key = rotate(query, cos, sin, position_ids), rotate(key, cos, sin, position_ids)
        if past_key_value is not None:
            key, value = past_key_value.update(key, value, self.layer_idx, {"sin": sin, "cos": cos})
        key = key.repeat_interleave(self.groups, dim=1)
        value = value.repeat_interleave(self.groups, dim=1)
        output, weights = self.attend(query, key, value, attention_mask)
        output = output.transpose(1, 2).reshape(hidden_states.shape)
        return self.o_proj(output), weights if output_attentions else None, past_key_value

    def attend(self, query, key, value, mask):
        scores = torch.matmul(query, key.transpose(2, 3)) / math.sqrt(self.head_dim)
        if mask is not None:
            scores = scores + mask
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        return torch.matmul(weights, value), weights


class DeepseekSdpaAttention(DeepseekAttention):
    def attend(self, query, key, value, mask):
        causal = self.is_causal and mask is None and query.shape[-2] > 1
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        return output, None


Deepseek_ATTENTION_CLASSES = {"eager": DeepseekAttention, "sdpa": DeepseekSdpaAttention}


class DeepseekDecoderLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        attention = Deepseek_ATTENTION_CLASSES[config._attn_implementation]
        self.self_attn = attention(config=config, layer_idx=layer_idx)
        sparse = (
            config.n_routed_experts is not None
            and layer_idx >= config.first_k_dense_replace
            and layer_idx % config.moe_layer_freq == 0
        )
        self.mlp = DeepseekMoE(config) if sparse else DeepseekMLP(config)
        self.input_layernorm = DeepseekRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = DeepseekRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        past_key_value=None,
        output_attentions=False,
        use_cache=False,
        **kwargs,
    ):
        attended, weights, present = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_value=past_key_value,
            output_attentions=output_attentions,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        outputs = (hidden_states,)
        if output_attentions:
            outputs += (weights,)
        if use_cache:
            outputs += (present,)
        return outputs


@add_start_docstrings("The bare model.")
class DeepseekPreTrainedModel(PreTrainedModel):
    config_class = DeepseekConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeepseekDecoderLayer"]  # noqa: RUF012 (as remote code has it)
    _skip_keys_device_placement = "past_key_values"
    _supports_flash_attn_2 = True
    _supports_sdpa = True
    _supports_cache_class = True

    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(mean=0.0, std=std)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.data.normal_(mean=0.0, std=std)
            if module.padding_idx is not None:
                module.weight.data[module.padding_idx].zero_()


class DeepseekModel(DeepseekPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [DeepseekDecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        )
        self._use_sdpa = config._attn_implementation == "sdpa"
        self.norm = DeepseekRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    @add_start_docstrings_to_model_forward("Inputs as usual.")
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        use_cache = use_cache if use_cache is not None else self.config.use_cache
        batch, length = input_ids.shape[:2]
        past = 0
        tuples = False
        if use_cache:
            tuples = not isinstance(past_key_values, Cache)
            if tuples:
                past_key_values = DynamicCache.from_legacy_cache(past_key_values)
            past = past_key_values.get_usable_length(length)
        if position_ids is None:
            position_ids = torch.arange(past, length + past, device=input_ids.device).unsqueeze(0)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        prepare = (
            _prepare_4d_causal_attention_mask_for_sdpa
            if self._use_sdpa and not output_attentions
            else _prepare_4d_causal_attention_mask
        )
        mask = prepare(attention_mask, (batch, length), inputs_embeds, past)
        hidden_states = inputs_embeds
        cache = None
        for layer in self.layers:
            outputs = layer(
                hidden_states,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_value=past_key_values,
                output_attentions=output_attentions,
                use_cache=use_cache,
            )
            hidden_states = outputs[0]
            if use_cache:
                cache = outputs[2 if output_attentions else 1]
        hidden_states = self.norm(hidden_states)
        if cache is not None and tuples:
            cache = cache.to_legacy_cache()
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=cache)


class DeepseekForCausalLM(DeepseekPreTrainedModel):
    _tied_weights_keys = ["lm_head.weight"]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.model = DeepseekModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    @add_start_docstrings_to_model_forward("Inputs as usual.")
    @replace_return_docstrings(output_type=CausalLMOutputWithPast, config_class="DeepseekConfig")
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        r"""
        Returns:
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict if return_dict is not None else self.config.use_return_dict,
        )
        logits = self.lm_head(outputs[0]).float()
        loss = None
        if labels is not None:
            loss = F.cross_entropy(
                logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)
            )
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values
        )
