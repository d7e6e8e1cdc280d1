"""The main job on an embedded default: data, experts, comparison and one question per domain, in one command."""
