"""Using an adapter: generation, streams and conversations; routes forced from outside; which expert spoke, where and how sure.

from srde.infer.analysis import analyse
from srde.infer.chat import Chat
from srde.infer.generate import generate
from srde.infer.route import routed
from srde.infer.stream import stream
"""
