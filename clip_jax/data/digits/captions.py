"""What is said about a digit: class names, the wordings of training, and wordings that training never sees.

Evaluation prompts import this too, so it imports nothing. No wording holds a number word of its own.
"""

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""Name of each digit; its place is the label."""

TRAIN_TEMPLATES = (
    "{}",
    "the digit {}",
    "the number {}",
    "a handwritten {}",
    "{}, written by hand",
    "a photo of the digit {}",
    "a scan of the number {}",
    "an image that shows {}",
    "this is a {}",
    "this digit is {}",
    "somebody wrote {} here",
    "a person has written the figure {}",
    "{} in pencil on paper",
    "{} is what somebody put down",
    "a {} drawn with a thick pen",
    "a grey picture of a {}",
    "a small scan of a {}",
    "a blurry {}, much enlarged",
    "a sloppy {}",
    "a neat {}",
    "the figure {} from a printed form",
    "white on black: the number {}",
    "it reads {}",
    "here you can see the number {}, a little crooked",
    "a low resolution scan of the digit {}, handwritten",
    "handwriting of the figure {}",
    "what the pen left on the paper is a {}",
    "{} as people write it",
    "a sheet with the digit {} in the middle",
)
"""Wordings of the training captions; `{}` is the digit as a word or as a figure."""

UNSEEN_TEMPLATES = (
    "a photograph of {}",
    "an ink sketch of the numeral {}",
    "{} jotted down quickly",
    "my child scribbled a {} yesterday",
    "the postal worker must recognise {}",
    "close-up view: numeral {}",
    "a scrawled {} cropped from an envelope",
    "the answer on the blackboard was {}",
    "pixels forming the symbol {}",
    "a cheque bearing the character {}",
)
"""Wordings of the held-out captions, for evaluation; each has content words that no training wording has."""


def caption(template: str, label: int, *, word: bool) -> str:
    """Returns the template's caption of digit `label`, as a word (`seven`) or as a figure (`7`)."""
    return template.format(CLASSES[label] if word else str(label))
