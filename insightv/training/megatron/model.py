"""A vision-language model of megatron-core: `GPTModel` behind the family's own vision part.

The vision tower and the projector are the plain transformers modules. They stand on the first
pipeline stage and are replicated over tensor parallel ranks: every rank of a group sees the
same pictures, computes the same features and gets the same gradients (averaged once a step,
so that ranks cannot drift apart). They are a few percent of a large model's weights, and this
way every family's tower, tiling and projector is right by construction.

Three parts of megatron-core's local layers are replaced. Rotary embeddings use position ids
(its own ``rope`` ignores them) with transformers' frequencies. Core attention takes any mask
(its own refuses packed sequences). The norm knows sequence parallelism (torch's is refused).
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask
from transformers import AutoModel

from insightv.training.megatron import cpu
from insightv.training.megatron.families import shape_of
from insightv.training.megatron.layers import CoreAttention, RMSNorm, Rotary
from insightv.training.megatron.layout import Layout, Shape


@dataclass(frozen=True)
class Inputs:
    """What the model takes; every stage gets all of it, the first alone looks at pictures.

    Attributes:
        input_ids: [R, W] tokens; W is the same in all micro-batches of a step, and a multiple
            of the tensor parallel size where sequences are parallel.
        position_ids: [R, W], or [3, R, W] for M-RoPE.
        mask: [R, 1, W, W] bool, true where a query sees a key; int32, segments as
            `insightv.training.attention.span_table` lists them; a `BlockMask`; or None for
            plain causal attention.
        pictures: What the family's ``get_image_features`` takes, by name; empty if none.
        places: [T] indices into R × W at which logits are computed; None for all.
    """

    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor | BlockMask | None
    pictures: dict[str, Tensor]
    places: Tensor | None = None


def initialise(layout: Layout, seed: int = 0) -> None:
    """Makes the process groups of a layout; `torch.distributed` must be up.

    Raises:
        UserError: The ranks hold no whole number of copies of the model.
    """
    layout.data_parallel(torch.distributed.get_world_size())
    # Hints for the writers of megatron-core, not for its users.
    for hint in (".*is deprecated. Please use `torch.distributed", "full scope is deprecated"):
        warnings.filterwarnings("ignore", hint)
    if not torch.cuda.is_available():
        warnings.filterwarnings("ignore", ".*CUDA_DEVICE_MAX_CONNECTIONS")
    cpu.install()
    with cpu.calls():
        parallel_state.initialize_model_parallel(
            layout.tensor_parallel,
            layout.pipeline_parallel,
            layout.virtual_stages if layout.virtual_stages > 1 else None,
            order="tp-cp-ep-dp-pp",
            create_gloo_process_groups=False,  # what needs them (other optimizers) is not used
        )
        tensor_parallel.model_parallel_cuda_manual_seed(seed)


def build(
    config: Any, layout: Layout, dtype: torch.dtype = torch.float32, recompute: bool = False
) -> list[VisionLanguageModel]:
    """This rank's part of a model, one piece for each virtual stage; weights are not set.

    Args:
        config: A transformers configuration of a whole vision-language model.
        layout: As given to `initialise`.
        dtype: Of all weights.
        recompute: Whether layers are computed again in the backward pass.

    Raises:
        UserError: The model or the layout is not supported.
    """
    shape = shape_of(config)
    layout.validate(shape)
    core = core_config(config, shape, layout, dtype, recompute)
    pieces = []
    for stage in range(layout.virtual_stages):
        virtual = stage if layout.virtual_stages > 1 else None
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=virtual)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual)
        with cpu.calls():
            piece = VisionLanguageModel(core, config, shape, layout, first, last, virtual, dtype)
        # What transformers made, and our norms, began on the CPU.
        pieces.append(piece.cuda() if torch.cuda.is_available() else piece)
    return pieces


def core_config(
    config: Any, shape: Shape, layout: Layout, dtype: torch.dtype, recompute: bool
) -> TransformerConfig:
    """megatron-core's configuration of the language model."""
    text = config.get_text_config()
    rotary = Rotary(text)
    # Interleaved stages are silently wrong without overlapped point-to-point messages (0.16.1).
    interleaved = layout.virtual_stages > 1
    stages: list[list[str]] = [["decoder"] * count for count in layout.split(shape.layers)]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.feed_forward,
        num_attention_heads=shape.heads,
        num_query_groups=shape.groups,
        kv_channels=shape.head,
        normalization="RMSNorm",
        layernorm_epsilon=text.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=functional.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.bias,
        qk_layernorm=shape.qk_norm,
        softmax_scale=rotary.scaling**2 * shape.head**-0.5,
        mrope_section=[],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        virtual_pipeline_model_parallel_size=layout.virtual_stages if interleaved else None,
        pipeline_model_parallel_layout=stages if layout.pipeline_parallel > 1 else None,
        sequence_parallel=layout.sequence_parallel,
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # Losses are exact shares of the global batch: summed over micro-batches, never averaged.
        calculate_per_token_loss=True,
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
        perform_initialization=False,  # every weight is read from a folder
        use_cpu_initialization=not torch.cuda.is_available(),
        # Kernels of apex and Transformer Engine; the computation is the same without them.
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
    )


class VisionLanguageModel(MegatronModule):
    """One pipeline stage: pictures and tokens in at the first, logits out at the last."""

    def __init__(
        self,
        core: TransformerConfig,
        config: Any,
        shape: Shape,
        layout: Layout,
        first: bool,
        last: bool,
        virtual: int | None,
        dtype: torch.dtype,
    ):
        """Builds the stage.

        Args:
            core: megatron-core's configuration.
            config: transformers' configuration.
            shape: The language model's sizes.
            layout: Where this stage stands.
            first: Whether it is the first stage of all.
            last: Whether it is the last.
            virtual: Its number among the rank's stages, None if there is one only.
            dtype: Of all weights.
        """
        super().__init__(core)
        # Read by megatron-core's schedules and gradient reductions.
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process, self.vp_stage = first, last, virtual
        self.share_embeddings_and_output_weights = shape.tied
        self.vocabulary = shape.vocabulary
        self.image_token: int = config.image_token_id
        self.vision = vision_part(config).to(dtype) if first else None
        if self.vision is not None:
            for weight in self.vision.parameters():
                weight.average_gradients_across_tp_domain = True  # type: ignore[attr-defined]
        self.language = LanguageModel(
            core,
            _block(core, shape, layout.split(shape.layers), virtual),
            vocab_size=layout.padded_vocabulary(shape.vocabulary),
            max_sequence_length=config.get_text_config().max_position_embeddings,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=shape.tied,
            position_embedding_type="mrope",
            scatter_embedding_sequence_parallel=False,  # only after the pictures are in
            vp_stage=virtual,
        )
        self.language.rotary_pos_emb = Rotary(config.get_text_config())
        _mark_cut(self.language)
        if last:
            # The head is applied to gathered hidden states, at some places only.
            self.language.output_layer.sequence_parallel = False
            self.language.output_layer.allreduce_dgrad = layout.tensor_parallel > 1

    def set_input_tensor(self, tensor: Any) -> None:
        """Called by the schedules with the previous stage's hidden states."""
        self.language.set_input_tensor(tensor)

    def shared_embedding_or_output_weight(self) -> Tensor:
        """Called by the gradient reductions of tied embeddings."""
        return self.language.shared_embedding_or_output_weight()

    def forward(self, inputs: Inputs) -> Tensor:
        """One stage.

        Returns:
            Hidden states [W, R, hidden] for the next stage; of the last stage this rank's
            columns of the logits, [R, W, vocabulary / ranks] or [T, vocabulary / ranks].
        """
        embeddings = self._embed(inputs) if self.pre_process else None
        hidden = self.language(
            inputs.input_ids, inputs.position_ids, inputs.mask, decoder_input=embeddings
        )
        return self._logits(hidden, inputs.places) if self.post_process else hidden

    def _embed(self, inputs: Inputs) -> Tensor:
        """[W, R, hidden]: token embeddings, pictures' features in their places."""
        embeddings = self.language.embedding(inputs.input_ids, inputs.position_ids)
        if inputs.pictures:
            assert self.vision is not None
            look: Any = self.vision.get_image_features
            found = look(**inputs.pictures, return_dict=True)
            features = torch.cat(list(found.pooler_output)).to(embeddings.dtype)
            held = (inputs.input_ids == self.image_token).unsqueeze(-1)
            if int(held.sum()) != features.shape[0]:
                raise ValueError(
                    f"{int(held.sum())} picture tokens for {features.shape[0]} picture features"
                )
            filled = embeddings.transpose(0, 1).masked_scatter(held, features)
            embeddings = filled.transpose(0, 1).contiguous()
        if self.config.sequence_parallel:
            embeddings = tensor_parallel.scatter_to_sequence_parallel_region(embeddings)
        return embeddings

    def _logits(self, hidden: Tensor, places: Tensor | None) -> Tensor:
        if self.config.sequence_parallel:
            # Each rank wants its own part of the whole gradient, which the head has summed.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False
            )
        hidden = hidden.transpose(0, 1)
        if places is not None:
            hidden = hidden.flatten(0, 1)[places]
        tied = self.share_embeddings_and_output_weights
        weight = self.language.shared_embedding_or_output_weight() if tied else None
        logits, _ = self.language.output_layer(hidden, weight=weight)
        held = logits.shape[-1]
        own = self.vocabulary - parallel_state.get_tensor_model_parallel_rank() * held
        if own < held:
            padding = torch.arange(held, device=logits.device) >= own
            logits = logits.masked_fill(padding, float("-inf"))
        return logits


class LanguageModel(GPTModel):
    """`GPTModel` that ends with hidden states: the head is applied where there are targets."""

    def _postprocess(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities [T] of targets [T] from each rank's columns of the logits [T, V / ranks].

    The whole vocabulary is never on one rank. The logits are used up.
    """
    return -tensor_parallel.vocab_parallel_cross_entropy(logits, targets)


def _mark_cut(language: nn.Module) -> None:
    """Marks matrices that are cut over tensor parallel ranks.

    megatron-core (0.16.1) does so only where it initialises them. Unmarked, a matrix counts as
    replicated, and the gradient norm has the first rank's part of it only.
    """
    cut = {
        tensor_parallel.ColumnParallelLinear: 0,
        tensor_parallel.VocabParallelEmbedding: 0,
        tensor_parallel.RowParallelLinear: 1,
    }
    for module in language.modules():
        dimension = cut.get(type(module))
        weight = getattr(module, "weight", None)
        marked = weight is None or hasattr(weight, "tensor_model_parallel")
        if dimension is not None and not marked:
            tensor_parallel.set_tensor_model_parallel_attributes(weight, True, dimension, 1)


def vision_part(config: Any) -> nn.Module:
    """A family's model without its language model: tower, projector, what merges tiles."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    # The language model is made with the rest; without layers and tokens it costs nothing.
    text.num_hidden_layers, text.vocab_size = 0, 1
    text.pad_token_id = None
    if getattr(text, "layer_types", None):
        text.layer_types = []
    part = AutoModel.from_config(config)
    part.language_model = None
    return part


def _block(
    core: TransformerConfig, shape: Shape, split: list[int], virtual: int | None
) -> TransformerBlockSubmodules:
    """The layers of this stage, with our norm and attention in megatron-core's local layer."""
    layer = get_gpt_layer_local_spec(qk_layernorm=shape.qk_norm, normalization="RMSNorm")
    parts = layer.submodules
    attention = parts.self_attention.submodules
    attention = replace(attention, core_attention=CoreAttention)
    if shape.qk_norm:
        attention = replace(attention, q_layernorm=RMSNorm, k_layernorm=RMSNorm)
    parts = replace(
        parts,
        input_layernorm=RMSNorm,
        pre_mlp_layernorm=RMSNorm,
        self_attention=replace(parts.self_attention, submodules=attention),
        sharded_state_dict_keys_map={},
    )
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    count = split[(virtual or 0) * stages + parallel_state.get_pipeline_model_parallel_rank()]
    spec = ModuleSpec(module=layer.module, submodules=parts)
    return TransformerBlockSubmodules(layer_specs=[spec] * count, layer_norm=RMSNorm)
