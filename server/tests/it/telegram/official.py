"""Talks to the fake Bot API with aiogram: official.py <base URL> <token> <chat>.

The fake has an update with a message and one with a pressed button ready, and refuses the first two messages.
Prints what was read as one JSON object; anything unexpected is an exception.
"""

import asyncio
import json
import sys

from aiogram import Bot
from aiogram.client.session.aiohttp import AiohttpSession
from aiogram.client.telegram import TelegramAPIServer
from aiogram.exceptions import TelegramForbiddenError, TelegramRetryAfter
from aiogram.types import InlineKeyboardButton, InlineKeyboardMarkup


async def talk(base, token, chat):
    api = TelegramAPIServer.from_base(base.rstrip("/"))
    async with Bot(token, session=AiohttpSession(api=api)) as bot:
        me = await bot.get_me()
        try:
            await bot.send_message(chat, "too much")
            raise AssertionError("no error")
        except TelegramRetryAfter as error:
            wait = error.retry_after
        try:
            await bot.send_message(chat, "blocked")
            raise AssertionError("no error")
        except TelegramForbiddenError:
            pass
        button = InlineKeyboardButton(text="Approve", callback_data="apr:9f2c")
        keyboard = InlineKeyboardMarkup(inline_keyboard=[[button]])
        sent = await bot.send_message(chat, "h\u00e4llo \U0001f980 & 42", reply_markup=keyboard)
        assert (sent.chat.id, sent.chat.type) == (chat, "private"), sent

        updates = await bot.get_updates(offset=0, limit=10, timeout=1, allowed_updates=["message", "callback_query"])
        message, pressed = updates
        assert (message.message.from_user.id, pressed.callback_query.from_user.id) == (chat, chat), updates
        assert await bot.answer_callback_query(pressed.callback_query.id, text="Approved") is True
        # What was confirmed does not come again.
        assert await bot.get_updates(offset=pressed.update_id + 1, timeout=0) == []

        edited = await bot.edit_message_text("done", chat_id=chat, message_id=sent.message_id)
        assert edited.message_id == sent.message_id, edited
        return {
            "bot": me.username,
            "sent": sent.text,
            "read": message.message.text,
            "pressed": pressed.callback_query.data,
            "wait": wait,
        }


if __name__ == "__main__":
    base_url, bot_token, chat_id = sys.argv[1:]
    print(json.dumps(asyncio.run(talk(base_url, bot_token, int(chat_id)))))
