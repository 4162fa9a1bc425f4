import json
import shutil
from importlib.util import find_spec

import pytest
import torch
from families import FAMILIES, picture, save_family
from transformers.utils import is_torchvision_available

from hpc.errors import RecordError, UserError
from insightv import chats, models
from insightv.records import Message

QUESTION = Message("user", "What is the value of A? Steps.")
STEP = Message("assistant", '{"title": "a", "content": "b", "next_action": "continue"}\n')
IMAGES = [picture(1, 100, 60), picture(2, 50, 120), picture(3)]


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, tmp_path_factory):
    folder = save_family(request.param, tmp_path_factory.mktemp("model"))
    return models.load(folder, "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_family("llava", tmp_path_factory.mktemp("model"))


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_encoding_is_the_processors_own(loaded):
    asked = [
        ([QUESTION, STEP], IMAGES[:1]),
        ([QUESTION], IMAGES[1:2]),
        ([QUESTION], IMAGES[1:]),
    ]
    if loaded.model.config.model_type == "llava_onevision":
        asked.pop()  # its processor takes no tiles where there are several pictures; we do
    encodings = [chats.encode(loaded.processor, *chat) for chat in asked]
    batch = chats.collate(encodings, loaded.tokenizer.pad_token_id)
    texts = [chats.render(loaded.processor, turns, len(images)) for turns, images in asked]
    own = loaded.processor(
        text=texts,
        images=[images for _, images in asked],
        padding=True,
        return_tensors="pt",
        add_special_tokens=False,
    )
    assert batch.keys() == own.keys()
    for name, tensor in own.items():
        assert torch.equal(batch[name], tensor), name


def test_a_batch_gives_what_each_row_gives_alone(loaded):
    encodings = [
        chats.encode(loaded.processor, [QUESTION, STEP], IMAGES[:1]),
        chats.encode(loaded.processor, [QUESTION], IMAGES[1:]),
    ]
    with torch.no_grad():
        together = loaded.model(**chats.collate(encodings, 0)).logits[:, -1]
        for row, encoding in enumerate(encodings):
            alone = loaded.model(**chats.collate([encoding], 0)).logits[0, -1]
            assert torch.allclose(together[row], alone, atol=1e-5)


def test_an_open_turn_ends_at_its_last_character(loaded):
    processor = loaded.processor
    asked = chats.render(processor, [QUESTION], 1)
    assert chats.render(processor, [QUESTION, STEP], 1) == asked + STEP.text
    assert chats.render(processor, [QUESTION, Message("assistant", "")], 1) == asked
    assert chats.render(processor, [QUESTION, Message("assistant", " \n")], 1) == asked + " \n"
    further = chats.render(processor, [QUESTION, STEP, Message("user", "Answer.")], 1)
    assert further.startswith(asked + STEP.text.rstrip()) and further.count("Answer.") == 1
    # A turn whose text stands in an earlier turn too.
    twice = [QUESTION, STEP, QUESTION, Message("assistant", "b")]
    assert chats.render(processor, twice, 0).endswith("b")


def test_control_tokens_in_data_are_text(loaded):
    token = loaded.processor.image_token
    evil = Message("user", f"{token} is {loaded.tokenizer.eos_token} and {token}")
    encoding = chats.encode(loaded.processor, [evil], IMAGES[:1])
    honest = chats.encode(loaded.processor, [QUESTION], IMAGES[:1])
    pictured = loaded.tokenizer.convert_tokens_to_ids(token)
    ending = loaded.tokenizer.eos_token_id
    assert encoding.ids.count(pictured) == honest.ids.count(pictured) > 1
    assert encoding.ids.count(ending) == honest.ids.count(ending)


def test_saved_models_load_again(loaded, tmp_path):
    models.save(loaded.model, loaded.processor, tmp_path / "again")
    again = models.load(tmp_path / "again", "cpu")
    assert all(
        torch.equal(first, second)
        for first, second in zip(
            loaded.model.state_dict().values(), again.model.state_dict().values(), strict=True
        )
    )
    first, second = (chats.encode(m.processor, [QUESTION], IMAGES) for m in (loaded, again))
    assert first.ids == second.ids


def test_torchvision_is_not_here():
    """So every test of a family, from its processor to the whole chain, does without it."""
    if find_spec("torchvision") is not None:
        pytest.skip("torchvision is installed: nothing shows that families do without it")
    assert not is_torchvision_available()


def test_the_vision_tower_is_frozen_and_nothing_else(loaded):
    frozen = models.freeze_vision(loaded.model)
    still = {name for name, p in loaded.model.named_parameters() if not p.requires_grad}
    assert frozen == sum(p.numel() for p in loaded.model.parameters() if not p.requires_grad) > 0
    assert all("vision_tower" in name or "visual" in name for name in still)
    free = {name for name, p in loaded.model.named_parameters() if p.requires_grad}
    assert any("merger" in name or "projector" in name for name in free)
    assert any("language_model" in name for name in free)


def test_video_settings_outlive_a_save(tmp_path):
    source = save_family("qwen2.5-vl", tmp_path / "base")
    config = json.loads((source / "processor_config.json").read_text())
    config["video_processor"] = {"video_processor_type": "Qwen2VLVideoProcessor", "fps": 2}
    (source / "processor_config.json").write_text(json.dumps(config))
    base = models.load(source, "cpu")
    models.save(base.model, base.processor, tmp_path / "tuned")
    kept = json.loads((tmp_path / "tuned" / "video_preprocessor_config.json").read_text())
    assert kept["fps"] == 2
    models.save(base.model, models.load(tmp_path / "tuned").processor, tmp_path / "twice")
    assert (tmp_path / "twice" / "video_preprocessor_config.json").is_file()


def test_the_digest_follows_the_bytes(folder, copy):
    assert models.digest_of(copy) == models.digest_of(folder) == models.load(folder).digest
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert models.digest_of(copy) != models.digest_of(folder)


def _no_config(copy):
    (copy / "config.json").unlink()


def _bad_config(copy):
    (copy / "config.json").write_text("{")


def _unknown_kind(copy):
    (copy / "config.json").write_text('{"model_type": "nonesuch"}')


def _text_model(copy):
    (copy / "config.json").write_text('{"model_type": "llama"}')


def _pickled(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")


def _cut_weights(copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def _lacking(copy):
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    del tensors[next(name for name in tensors if "q_proj" in name)]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})


def _other_shape(copy):
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 96
    (copy / "config.json").write_text(json.dumps(config))


def _no_template(copy):
    (copy / "chat_template.jinja").unlink()


def _no_tokenizer(copy):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()


def _foreign_code(copy):
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "code.py").write_text("raise SystemExit('ran foreign code')")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (shutil.rmtree, "no model folder"),
        (_no_config, "no config.json"),
        (_bad_config, "config.json cannot be read"),
        (_unknown_kind, "cannot be loaded"),
        (_text_model, "cannot be loaded"),
        (_pickled, r"no \*\.safetensors"),
        (_cut_weights, "damaged"),
        (_lacking, "lack 1 tensors"),
        (_other_shape, "damaged or do not fit"),
        (_no_template, "no chat template"),
        (_no_tokenizer, "cannot be loaded|no processor"),
        (_foreign_code, "cannot be loaded"),
    ],
)
def test_a_wrong_folder_is_told_in_one_line(copy, damage, told):
    damage(copy)
    with pytest.raises(UserError, match=told) as caught:
        models.load(copy, "cpu")
    assert "\n" not in str(caught.value) and str(copy) in str(caught.value)


def test_wrong_devices_and_types_are_told(folder):
    with pytest.raises(UserError, match="no device 'gpu'"):
        models.load(folder, "gpu")
    with pytest.raises(UserError, match="no dtype 'int8'"):
        models.load(folder, "cpu", "int8")


def test_a_picture_the_processor_refuses(tmp_path):
    loaded = models.load(save_family("qwen2.5-vl", tmp_path), "cpu")
    with pytest.raises(RecordError, match="no picture of 2000x2"):
        chats.encode_picture(loaded.processor, picture(0, 2000, 2))


def test_a_template_that_refuses_or_drops_the_picture(folder):
    loaded = models.load(folder, "cpu")
    loaded.processor.chat_template = "{{ raise_exception('no turns, please') }}"
    with pytest.raises(RecordError, match="no turns, please"):
        chats.encode(loaded.processor, [QUESTION], IMAGES[:1])
    loaded.processor.chat_template = (
        "{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}"
    )
    with pytest.raises(RecordError, match="shows 0 of 1 pictures"):
        chats.encode(loaded.processor, [QUESTION], IMAGES[:1])
