"""What a method's own file says about it: read as text, so that a report needs neither torch nor the method."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources

PAPERS: dict[str, tuple[str, str, int]] = {
    "1707.06347": (
        "Proximal Policy Optimization Algorithms",
        "John Schulman and Filip Wolski and Prafulla Dhariwal and Alec Radford and Oleg Klimov",
        2017,
    ),
    "2402.03300": (
        "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
        "Zhihong Shao and Peiyi Wang and Qihao Zhu and Runxin Xu and Junxiao Song and Xiao Bi and Haowei Zhang "
        "and Mingchuan Zhang and Y. K. Li and Y. Wu and Daya Guo",
        2024,
    ),
    "2402.14740": (
        "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs",
        "Arash Ahmadian and Chris Cremer and Matthias Gall{\\'e} and Marzieh Fadaee and Julia Kreutzer "
        'and Olivier Pietquin and Ahmet {\\"U}st{\\"u}n and Sara Hooker',
        2024,
    ),
    "2404.08495": (
        "Dataset Reset Policy Optimization for RLHF",
        "Jonathan D. Chang and Wenhao Zhan and Owen Oertell and Kiant{\\'e} Brantley and Dipendra Misra "
        "and Jason D. Lee and Wen Sun",
        2024,
    ),
    "2305.10425": (
        "SLiC-HF: Sequence Likelihood Calibration with Human Feedback",
        "Yao Zhao and Rishabh Joshi and Tianqi Liu and Misha Khalman and Mohammad Saleh and Peter J. Liu",
        2023,
    ),
    "2305.18290": (
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        "Rafael Rafailov and Archit Sharma and Eric Mitchell and Stefano Ermon and Christopher D. Manning "
        "and Chelsea Finn",
        2023,
    ),
    "2306.02561": (
        "LLM-Blender: Ensembling Large Language Models with Pairwise Ranking and Generative Fusion",
        "Dongfu Jiang and Xiang Ren and Bill Yuchen Lin",
        2023,
    ),
    "2310.12036": (
        "A General Theoretical Paradigm to Understand Learning from Human Preferences",
        "Mohammad Gheshlaghi Azar and Mark Rowland and Bilal Piot and Daniel Guo and Daniele Calandriello "
        "and Michal Valko and R{\\'e}mi Munos",
        2023,
    ),
    "2312.11456": (
        "Iterative Preference Learning from Human Feedback: Bridging Theory and Practice for RLHF under KL-Constraint",
        "Wei Xiong and Hanze Dong and Chenlu Ye and Ziqi Wang and Han Zhong and Heng Ji and Nan Jiang and Tong Zhang",
        2023,
    ),
    "2402.04792": (
        "Direct Language Model Alignment from Online AI Feedback",
        "Shangmin Guo and Biao Zhang and Tianlin Liu and Tianqi Liu and Misha Khalman and Felipe Llinares "
        "and Alexandre Rame and Thomas Mesnard and Yao Zhao and Bilal Piot and Johan Ferret and Mathieu Blondel",
        2024,
    ),
    "2403.19270": (
        "sDPO: Don't Use Your Data All at Once",
        "Dahyun Kim and Yungi Kim and Wonho Song and Hyeonwoo Kim and Yunsu Kim and Sanghoon Kim and Chanjun Park",
        2024,
    ),
    "2404.19733": (
        "Iterative Reasoning Preference Optimization",
        "Richard Yuanzhe Pang and Weizhe Yuan and Kyunghyun Cho and He He and Sainbayar Sukhbaatar and Jason Weston",
        2024,
    ),
    "2405.14103": (
        "Online Self-Preferring Language Models",
        "Yuanzhao Zhai and Zhuo Zhang and Kele Xu and Hanyang Peng and Yue Yu and Dawei Feng and Cheng Yang "
        "and Bo Ding and Huaimin Wang",
        2024,
    ),
    "2405.19332": (
        "Self-Exploring Language Models: Active Preference Elicitation for Online Alignment",
        "Shenao Zhang and Donghan Yu and Hiteshi Sharma and Han Zhong and Zhihan Liu and Ziyi Yang and Shuohang Wang "
        "and Hany Hassan and Zhaoran Wang",
        2024,
    ),
    "2405.21046": (
        "Exploratory Preference Optimization: Harnessing Implicit Q*-Approximation for Sample-Efficient RLHF",
        "Tengyang Xie and Dylan J. Foster and Akshay Krishnamurthy and Corby Rosset and Ahmed Awadallah "
        "and Alexander Rakhlin",
        2024,
    ),
    "2406.01462": (
        "The Importance of Online Data: Understanding Preference Fine-tuning via Coverage",
        "Yuda Song and Gokul Swamy and Aarti Singh and J. Andrew Bagnell and Wen Sun",
        2024,
    ),
}
"""arXiv number -> title, authors, year; a number that is missing here is cited by number alone"""

TITLES = {"sdpo": "sDPO", "drpo": "DR-PO"}
"""names that neither a docstring nor a rule spells right"""


@dataclass(frozen=True)
class Method:
    """First docstring line of `methods/NAME.py` and the arXiv numbers its docstring names."""

    name: str
    summary: str
    papers: tuple[str, ...]

    @property
    def title(self) -> str:
        """The name as its docstring spells it (HyPO, Online DPO), else capitals for a short name, else a plain word."""
        if self.name in TITLES:
            return TITLES[self.name]
        spelled = self.summary.partition(":")[0]
        if spelled.lower().replace(" ", "_") == self.name:
            return spelled
        return self.name.upper() if len(self.name) <= 4 else self.name.replace("_", " ").capitalize()


@cache
def describe(name: str) -> Method:
    """The method's summary and papers; a name without a file (another version's run) has neither."""
    source = resources.files("prefkit").joinpath("methods", f"{name}.py")
    if not name.isidentifier() or not source.is_file():
        return Method(name, "", ())
    text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    numbers = dict.fromkeys(re.findall(r"\b\d{4}\.\d{4,5}\b", text))
    return Method(name, text.split("\n", 1)[0].strip(), tuple(numbers))


def bibtex(number: str) -> str:
    """A BibTeX entry for an arXiv number."""
    fields = {"eprint": number, "archivePrefix": "arXiv"}
    if number in PAPERS:
        title, authors, year = PAPERS[number]
        fields = {"title": "{" + title + "}", "author": authors, "year": str(year)} | fields
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    return f"@misc{{arxiv-{number},\n{lines}\n}}"
