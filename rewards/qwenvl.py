"""QwenVL score: a vision-language model reads picture and prompt, and gives an overall score.

    from rewards.qwenvl import QwenVL
    scores = QwenVL("Qwen/Qwen3-VL-8B-Instruct", device="cuda")(images, prompts)  # (B,), 1 to 5

The reply is decoded greedily. The score is the whole number between <OverallScore> tags. A reply
without one is a miss and counts 0, as in Flow-OPD's code; `evaluate.py` shows how many there are,
and the mean over the others. Nothing is clipped: "10" is 10. Flow-OPD's code returns the number
divided by 5, its table has 3.45 for SD3.5-Medium and 4.05 for its student.

No published number can be reproduced for certain. The paper names a model without eyes
(Qwen3-30B-A3B-Instruct-2507), its script serves Qwen3-VL-30B-A3B-Instruct, the prompt in its figure
is not public, and batched bfloat16 changes greedy replies. So the column is called qwenvl@MODEL,
and scores of two models are not comparable.

PROMPT is Flow-OPD's strict one (flow_grpo/qwenvl.py at 434ab16, QwenVLScorerRemote; MIT licence,
copyright (c) 2025 Jie Liu), word for word: with other words it would be another judge. SYSTEM is
what Qwen2-VL's and Qwen2.5-VL's chat template puts before it.

Weights: Qwen/Qwen3-VL-30B-A3B-Instruct (62 GB in bfloat16), Qwen/Qwen3-VL-8B-Instruct (18 GB),
Qwen/Qwen2.5-VL-7B-Instruct (17 GB), all Apache-2.0, or a folder with any model of KINDS. No code
from the hub is run, and torchvision is not needed.
Checked here with random weights of each kind: the tokens, and greedy decoding against an argmax
loop without a cache. Not checked: the real weights, and our turns against their chat templates.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers import GenerationConfig, Qwen2VLImageProcessorPil

from rewards.images import as_pictures

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")  # model_type in config.json
JUDGES = ("Qwen3-VL-30B-A3B-Instruct", "Qwen3-VL-8B-Instruct", "Qwen2.5-VL-7B-Instruct")
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
SCORE = re.compile(r"<OverallScore>(\d+)</OverallScore>")
PROMPT = """\
Your role is to evaluate the generated image on three dimensions: aesthetic quality, instruction \
following, and an overall score that prioritizes instruction adherence.

=== Aesthetic Quality ===
1. Bad: Extremely blurry, underexposed with significant noise, indiscernible subjects, and \
chaotic composition.
2. Poor: Noticeable blur, poor lighting, washed-out colors, and awkward composition with cut-off \
subjects.
3. Fair: In focus with adequate lighting, dull colors, decent composition but lacks creativity.
4. Good: Sharp, good exposure, vibrant colors, thoughtful composition with a clear focal point.
5. Excellent: Exceptional clarity, perfect exposure, rich colors, masterful composition with \
emotional impact.

=== Instruction Following ===
Instruction: {prompt}
1. Bad: The image completely ignores or contradicts the instruction.
2. Poor: The image only vaguely relates to the instruction, missing most key elements.
3. Fair: The image partially follows the instruction, but misses or distorts some important \
elements.
4. Good: The image mostly follows the instruction with minor deviations.
5. Excellent: The image perfectly and faithfully follows the instruction.

=== Overall Score ===
The overall score should PRIMARILY reflect instruction adherence. An image that perfectly follows \
the instruction but has slightly lower aesthetic quality should score higher than a beautiful \
image that ignores the instruction.
1 = Bad, 2 = Poor, 3 = Fair, 4 = Good, 5 = Excellent
**Be extremely strict.**
Please first provide a detailed analysis of all three dimensions within the <Thought> tag. Then, \
give three scores from 1 to 5 within the <QualityScore>, <InstructionScore>, and <OverallScore> \
tags.
<Thought>
[Analyze the aesthetic quality, instruction adherence, and overall impression in detail here]
</Thought>
<QualityScore>X</QualityScore>
<InstructionScore>Y</InstructionScore>
<OverallScore>Z</OverallScore>"""


class QwenVL:
    """Callable (images, prompts, metadata=None) -> (B,) float32 on the CPU; 0 is a miss.

    weights: hub id or folder. device: where the model is loaded at the first call;
    `reward.model = None` drops it again. Nothing is downloaded: where a file is missing, ValueError
    names the command.
    batch: images per forward pass. It changes replies by rounding, which grows with their length.
    max_new_tokens: longest reply; the server of Flow-OPD stops there too."""

    higher_is_better = True
    range = (0.0, 5.0)

    def __init__(
        self,
        weights: str | Path = f"Qwen/{JUDGES[0]}",
        device: torch.device | str = "cpu",
        batch: int = 8,
        dtype: torch.dtype = torch.bfloat16,
        max_new_tokens: int = 2048,
    ) -> None:
        self.name = f"qwenvl@{Path(weights).name}"
        self.weights = weights
        self.device = device
        self.batch = batch
        self.dtype = dtype
        self.max_new_tokens = max_new_tokens
        self.model = None

    def load(self) -> None:
        files = "--include '*.json' --include merges.txt --include '*.safetensors'"
        fetch = f"hf download {self.weights} {files}"
        from_hub = {"local_files_only": True, "trust_remote_code": False}
        try:
            config = AutoConfig.from_pretrained(self.weights, **from_hub)
            if config.model_type not in KINDS:
                raise ValueError(f"model_type {config.model_type}, not one of {', '.join(KINDS)}")
            self.tokenizer = AutoTokenizer.from_pretrained(self.weights, **from_hub)
            self.processor = Qwen2VLImageProcessorPil.from_pretrained(self.weights, **from_hub)
            # Straight onto the device: 62 GB need not fit into the host's memory.
            model, info = AutoModelForImageTextToText.from_pretrained(
                self.weights,
                use_safetensors=True,
                dtype=self.dtype,
                device_map=str(self.device),
                output_loading_info=True,
                **from_hub,
            )
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            what = f"cannot load {self.weights} ({reason})"
            raise ValueError(f"{self.name}: {what}; {fetch}") from error
        missing = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
        if missing:  # transformers would use random weights in their place
            what = f"{self.weights} lacks {len(missing)} weights ({missing[0]}, …)"
            raise ValueError(f"{self.name}: {what}; {fetch}")
        # After an incomplete download transformers makes an empty tokenizer.
        pad = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        if pad != config.image_token_id or len(self.tokenizer) <= pad:
            raise ValueError(f"{self.name}: {self.weights} lacks its vocabulary; {fetch}")
        # In place of the model's own settings, which sample (Qwen3-VL) or penalise repetition.
        ends = ["<|im_end|>", "<|endoftext|>"]
        model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self.tokenizer.convert_tokens_to_ids(ends),
            pad_token_id=self.tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        )
        self.system = SYSTEM
        if config.model_type.startswith("qwen3"):
            self.system = ""
        self.model = model.eval()

    def tokens(self, prompt: str, number: int) -> list[int]:
        """The user's turn and the beginning of the reply. number: of the picture's tokens."""
        encode = lambda text, **how: self.tokenizer(text, **how).input_ids
        before = encode(f"{self.system}<|im_start|>user\n<|vision_start|>")
        picture = [self.model.config.image_token_id] * number
        # In a prompt, "<|im_end|>" is text and ends nothing.
        request = encode(PROMPT.format(prompt=prompt), split_special_tokens=True)
        after = encode("<|im_end|>\n<|im_start|>assistant\n")
        return before + picture + encode("<|vision_end|>") + request + after

    @torch.no_grad()
    def replies(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
        """What the judge writes about one batch of RGB pictures."""
        prepared = self.processor(list(pictures), return_tensors="pt").to(self.device)
        # A token stands for 2 x 2 patches: 256 at 512 x 512 in Qwen3-VL, 324 in Qwen2.5-VL.
        numbers = prepared.image_grid_thw.prod(1) // self.processor.merge_size**2  # (b,)
        rows = [self.tokens(*turn) for turn in zip(prompts, numbers.tolist())]
        longest = max(len(row) for row in rows)
        ids = torch.full((len(rows), longest), self.model.generation_config.pad_token_id)
        mask = torch.zeros_like(ids)  # (b, L)
        for i, row in enumerate(rows):  # padded on the left: replies start side by side
            ids[i, longest - len(row) :] = torch.tensor(row)
            mask[i, longest - len(row) :] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        is_picture = (ids == self.model.config.image_token_id).long()
        output = self.model.generate(
            input_ids=ids, attention_mask=mask, mm_token_type_ids=is_picture, **prepared
        )
        return self.tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)

    def __call__(
        self,
        images: torch.Tensor | Sequence[Image.Image],
        prompts: Sequence[str],
        metadata: Sequence[dict] | None = None,
    ) -> torch.Tensor:
        pictures, prompts = as_pictures(images), list(prompts)
        if len(pictures) != len(prompts):
            counts = f"{len(pictures)} images and {len(prompts)} prompts"
            raise ValueError(f"{self.name}: {counts}; give one prompt per image")
        if pictures and self.model is None:
            self.load()
        scores = []
        for i in range(0, len(pictures), self.batch):
            end = i + self.batch
            replies = self.replies(pictures[i:end], prompts[i:end])
            scores += [read_score(reply) for reply in replies]
        return torch.tensor(scores)


def read_score(reply: str) -> float:
    """The first whole number between the tags; 0 for a miss, such as "4.5", "4/5" or no tags."""
    found = SCORE.search(reply)
    if found is None:
        return 0.0
    return float(found[1])
