"""The command line in an empty folder."""

from command_line import curv as curv
from command_line import folder as folder
from command_line import task as task
from hugging_face import make as make
from hugging_face import tokenizer as tokenizer
