"""The demo's charts as lmms-eval's ChartQA and MMMU have theirs: Parquet in those schemas.

Columns: huggingface.co/datasets/lmms-lab/ChartQA (type, question, answer, image) and
lmms-lab/MMMU (id, question, options written out as a list, explanation, image_1 … image_7,
img_type, answer, topic_difficulty, question_type, subfield), under the names that lmms-eval 0.7.3
loads them by. Where it runs in the folder that holds them, `datasets` finds them there.
"""

import json

from datasets import Image, Value
from set_files import parquet, stored

from insightv.demo.sets import QuestionsConfig, Sizes, make_questions
from insightv.pictures import Pictures, PictureWriter

TEXT = Value("string")
CHARTQA = {"type": TEXT, "question": TEXT, "answer": TEXT, "image": Image()}
MMMU = {
    **dict.fromkeys(("id", "question", "options", "explanation"), TEXT),
    **{f"image_{number}": Image() for number in range(1, 8)},
    **dict.fromkeys(("img_type", "answer", "topic_difficulty", "question_type", "subfield"), TEXT),
}


def write(folder, chartqa: int, mmmu: int, two_pictures: int = 0) -> None:
    """Writes both sets below a folder.

    Args:
        folder: Where lmms-eval is to run.
        chartqa: Questions of the one set.
        mmmu: Of the other; those of choice first, then open ones.
        two_pictures: How many of those show a second chart, which is asked for nothing.
    """
    sizes = QuestionsConfig(Sizes(test=chartqa + 12 * mmmu), Sizes(test=0), Sizes(test=0))
    with PictureWriter(folder / "pictures") as writer:
        asked = list(make_questions("test", sizes, 0, writer))
    pictures = Pictures([folder / "pictures"])
    chosen = [question for question in asked if question.answer_type == "choice"][: mmmu // 2]
    plain = [question for question in asked if question.answer_type in ("number", "label")]
    shown = [stored(pictures.bytes(question.pictures[0])) for question in plain]
    rows = [
        {
            "type": "human_test" if place % 2 else "augmented_test",
            "question": question.text,
            "answer": question.answer,
            "image": picture,
        }
        for place, (question, picture) in enumerate(zip(plain, shown, strict=True))
    ][:chartqa]
    parquet(folder / "lmms-lab-encoder/ChartQA/data/test-00000-of-00001.parquet", CHARTQA, rows)
    rows = []
    for place, question in enumerate(chosen + plain[chartqa : chartqa + mmmu - len(chosen)]):
        row = {
            "id": f"validation_{('Math', 'Economics')[place % 2]}_{place + 1}",
            "question": f"<image 1> {question.text}",
            "options": str(list(question.options)),
            "image_1": stored(pictures.bytes(question.pictures[0])),
            "img_type": "['Plots and Charts']",
            "answer": question.answer,
            "topic_difficulty": "Easy",
            "question_type": "multiple-choice" if question.options else "open",
            "subfield": question.task,
        }
        if place < two_pictures:
            row |= {"question": f"{row['question']} <image 2>", "image_2": shown[-1 - place]}
        rows.append(row)
    parquet(folder / "lmms-lab-encoder/MMMU/data/validation-00000-of-00001.parquet", MMMU, rows)
    (folder / "questions.json").write_text(json.dumps([question.to_json() for question in asked]))
