"""An engine that says what a function tells it to, and remembers what it was asked."""

from insightv.engines.base import Completion


class Scripted:
    digest = "scripted"
    concurrency = 4

    def __init__(self, reply, context=10**6):
        self.reply, self.context = reply, context
        self.requests, self.closed = [], False

    async def complete(self, request):
        self.requests.append(request)
        text = self.reply(request, len(self.requests))
        return Completion(text, len(text.split()), "stop")

    def count(self, request):
        return sum(len(message.text) for message in request.messages)

    async def close(self):
        self.closed = True
