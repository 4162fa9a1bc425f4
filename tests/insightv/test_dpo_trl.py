"""DPO against TRL's trainer: loss, metrics and every gradient, reference unlike the policy."""

import asyncio
import copy
import warnings

import pytest
import torch
from training_case import family, loaded, pair_rows, store

from insightv import chats
from insightv.records import Message
from insightv.training.batches import Encoder, encode_all
from insightv.training.config import DPOConfig, ReferenceConfig
from insightv.training.objectives import Preference, Totals, preference_metrics
from insightv.training.policy import token_logps
from insightv.training.reference import Reference
from insightv.training.torch_backend import TorchBackend

MIXTURES = {
    "sigmoid": {"sigmoid": 1.0},
    "sigmoid+sft": {"sigmoid": 1.0, "sft": 0.7},
    "ipo": {"ipo": 1.0},
    "mpo": {"sigmoid": 0.8, "bco": 0.2, "sft": 1.0},
    "normalised": {"sigmoid": 1.0},
}
THEIRS = {"bco": "bco_pair"}
FIELDS = {"accuracy": "accuracies", "margin": "margins", "reward_chosen": "chosen"}


def trl_says(name, rows, pictures, mixture, beta, folder):
    """Loss, gradients and metrics of TRL's DPOTrainer on the rows as one batch."""
    from datasets import Dataset
    from trl import DPOConfig as TheirConfig
    from trl import DPOTrainer

    terms = MIXTURES[mixture]
    named = [THEIRS.get(term, term) for term in terms]
    policy, reference = loaded(name, 0), loaded(name, 1)
    eos = policy.tokenizer.eos_token
    data = []
    for row in rows:
        prompt = [Message(**turn) for turn in row["prompt"]]
        data.append(
            {
                "images": [pictures.image(key) for key in row["pictures"]],
                "prompt": chats.render(policy.processor, prompt, len(row["pictures"])),
                "chosen": row["chosen"] + eos,
                "rejected": row["rejected"] + eos,
            }
        )
    model = copy.deepcopy(policy.model)
    args = TheirConfig(
        output_dir=str(folder),
        per_device_train_batch_size=len(data),
        report_to="none",
        use_cpu=True,
        bf16=False,
        beta=beta,
        max_length=None,
        save_strategy="no",
        gradient_checkpointing=False,
        loss_type=["sigmoid_norm"] if mixture == "normalised" else named,
        loss_weights=list(terms.values()),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = DPOTrainer(
            model=model,
            ref_model=copy.deepcopy(reference.model),
            args=args,
            train_dataset=Dataset.from_list(data),
            processing_class=policy.processor,
        )
        inputs = trainer.data_collator(list(data))
        model = trainer.model.train()
        loss = trainer.compute_loss(model, dict(inputs))
    loss.backward()
    metrics = {key: values[0] for key, values in trainer._metrics["train"].items() if values}
    named = model.named_parameters()
    return loss.item(), {k: p.grad for k, p in named if p.grad is not None}, metrics


def we_say(name, rows, pictures, mixture, beta, budget):
    precise = ReferenceConfig(precision="fp32", device="cpu")

    async def refer():
        reference = Reference(family(name, 1), precise, pictures)
        try:
            return await reference("question", {"pairs": rows})
        finally:
            await reference.close()

    config = DPOConfig(
        terms=MIXTURES[mixture],
        length_normalised=mixture == "normalised",
        beta=beta,
        precision="fp32",
        device="cpu",
        freeze_vision=False,
        tokens_per_micro_batch=budget,
    )
    backend = TorchBackend(family(name, 0), config)
    encoder = Encoder(backend.processor, pictures, 4096, 64)
    examples, dropped = encode_all(asyncio.run(refer()), encoder.pair)
    assert not dropped
    batches = backend.packer.batches(examples)
    totals, objective = Totals.of(batches), Preference(config)
    loss, parts = 0.0, []
    for batch in batches:
        share, part = objective.share(token_logps(backend.model, batch), batch, totals)
        share.backward()
        loss += share.item()
        parts.append(part)
    named = backend.model.named_parameters()
    gradients = {k: p.grad for k, p in named if p.grad is not None}
    return loss, gradients, preference_metrics(parts, beta), len(batches)


@pytest.mark.parametrize("name", ["llava-next", "qwen2.5-vl"])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_loss_and_gradients_equal_trls(name, mixture, tmp_path):
    pictures, ids = store(tmp_path / "pictures")
    rows = pair_rows(ids, 5)
    theirs, their_gradients, their_metrics = trl_says(name, rows, pictures, mixture, 0.3, tmp_path)
    for budget in (10**6, 600):
        ours, gradients, metrics, cuts = we_say(name, rows, pictures, mixture, 0.3, budget)
        assert cuts > 1 or budget != 600
        assert ours == pytest.approx(theirs, abs=1e-5)
        assert gradients.keys() == their_gradients.keys()
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(gradient, their_gradients[parameter], atol=1e-5, rtol=1e-4)
        assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-3
        for mine, field in FIELDS.items():
            assert metrics[mine] == pytest.approx(their_metrics[f"rewards/{field}"], abs=1e-4)
        assert metrics["logp_rejected"] == pytest.approx(their_metrics["logps/rejected"], abs=1e-3)
