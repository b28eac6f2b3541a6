"""What is not a problem: greetings, "who are you", and questions beyond a reasoner of this size.  Never tested."""

from __future__ import annotations

import random

from tiercel.problems.problem import Problem

ME = (
    "I am a small reasoner. I can do arithmetic, word problems, sorting, counting and simple equations, "
    "and I write out my steps."
)
BEYOND = "That is beyond me. I am a small reasoner: ask me to compute, sort, count or solve a simple equation."
GREETINGS = (
    "hi", "Hi!", "hello", "Hello!", "hey", "Hey there", "hi there", "Good morning", "good evening", "Hello, how are you?",
    "How are you?", "what's up", "Hello there!", "hallo", "yo", "Good day",
)  # fmt: skip
WHO = (
    "Who are you?", "who are you", "What are you?", "What can you do?", "what can you do", "Help", "help me", "What is your "
    "name?", "Tell me about yourself.", "How do you work?", "What do you know?", "Are you an AI?", "who made you?",
)  # fmt: skip
THANKS = ("Thanks!", "thank you", "Thank you!", "thanks", "Great, thanks.", "ok", "cool", "Bye", "bye!", "Goodbye")
TOPICS = (
    "France Japan Brazil Kenya Canada Egypt India history music poetry football chess cooking physics biology love "
    "the_moon the_sea cats dogs dragons space trains art politics money Berlin Paris Rome Tokyo summer winter trees "
    "the_sun gravity whales volcanoes Shakespeare Einstein Newton Mozart Napoleon"
).replace("_", " ").split()  # fmt: skip
OTHER = (
    "What is the capital of {x}?", "Write a poem about {x}.", "Tell me a story about {x}.", "Who was {x}?",
    "Why is the sky blue?", "Tell me a joke.", "Tell me a joke about {x}.", "Translate {x} into French.",
    "What do you think about {x}?", "Explain {x} to me.", "Write an email about {x}.", "When did {x} begin?",
    "Where is {x}?", "What is {x}?", "Summarize the history of {x}.", "Write a Python function about {x}.",
    "Who won the game about {x}?", "How do I cook {x}?", "What is the weather in {x}?", "What is the meaning of life?",
)  # fmt: skip


def talk(rng: random.Random, size: int = 1) -> Problem:
    kind = rng.random()
    if kind < 0.25:
        question, thinking, answer = rng.choice(GREETINGS), "A greeting.", f"Hello! {ME}"
    elif kind < 0.45:
        question, thinking, answer = rng.choice(WHO), "They ask about me.", ME
    elif kind < 0.55:
        question, thinking, answer = rng.choice(THANKS), "Nothing to work out.", "You are welcome. Give me another problem."
    else:
        question = rng.choice(OTHER).format(x=rng.choice(TOPICS))
        thinking, answer = "Not a problem I can work out.", BEYOND
    return Problem("talk", question, thinking, answer, "", size)
