-- The bot: what Telegram sent, what is to be sent to it, and which chat belongs to which run.
--
-- An update is a row of `telegram_inbox` before anything is done about it; acting on it and marking it is one transaction. What the
-- bot says is a row of `telegram_outbox`, written in the transaction that causes it and sent afterwards.

create table telegram_chats (
  chat_id bigint primary key,
  project_id uuid references projects,        -- what /status, /download and /cancel mean
  asks jsonb,                                 -- {"run_id", "path", "step"}: the next text is what to change in that plan
  blocked_at timestamptz,                     -- the user blocked the bot: nothing is sent until he writes again
  next_send_at timestamptz not null default '-infinity',
  created_at timestamptz not null default engine_now()
);

-- `n` is the order of arrival: update ids of Telegram may fall after a week of silence. `raw` holds no secrets: what looked like a
-- key was cut out before the insert, which `redacted` tells.
create table telegram_inbox (
  update_id bigint primary key,
  n bigint generated always as identity constraint telegram_inbox_n_key unique,
  chat_id bigint,                             -- updates of one chat are acted upon in order
  urgent boolean not null default false,      -- must be answered within seconds: not behind others
  raw jsonb not null,
  redacted boolean not null default false,
  received_at timestamptz not null default engine_now(),
  not_before timestamptz not null default engine_now(),
  tries int not null default 0,
  processed_at timestamptz,
  error text                                  -- of the last try that failed
);
create index telegram_inbox_open on telegram_inbox (n) where processed_at is null;
create index telegram_inbox_processed_at on telegram_inbox (processed_at) where processed_at is not null;

-- A row that is written again under its key replaces its text (`version` rises): while it was not sent, only the newest text goes
-- out; once it has a `telegram_message_id`, the message is edited. `sending` is set before the call and cleared after it, so a row
-- found `sending` by the next process has an unknown outcome. `unknown`: given up after such outcomes; `dead`: refused or too late.
create table telegram_outbox (
  id bigint generated always as identity primary key,
  chat_id bigint not null,
  dedupe_key text not null constraint telegram_outbox_dedupe_key unique,
  method text not null,
  body jsonb not null,
  urgent boolean not null default false,      -- not a message: outside the pace of the chat
  version int not null default 1,
  state text not null default 'queued' check (state in ('queued','sending','sent','dead','unknown')),
  queued_at timestamptz not null default engine_now(),
  not_before timestamptz not null default engine_now(),
  tries int not null default 0,
  unknowns int not null default 0,            -- tries with an unknown outcome
  telegram_message_id bigint,
  error text,
  created_at timestamptz not null default engine_now()
);
create index telegram_outbox_open on telegram_outbox (chat_id, queued_at) where state in ('queued','sending');
create index telegram_outbox_created_at on telegram_outbox (created_at);

-- Runs that a chat follows.
create table telegram_runs (
  run_id uuid primary key,
  chat_id bigint not null references telegram_chats,
  user_id uuid not null references users,
  project_id uuid not null references projects,
  looked_at timestamptz not null default engine_now(),
  closed_at timestamptz,                      -- its end was told
  created_at timestamptz not null default engine_now()
);
create index telegram_runs_open on telegram_runs (chat_id) where closed_at is null;

-- What a run asked of its owner, once per place of the run, and whether that was answered. The row may be born answered: who types
-- before the question is out has answered it.
create table telegram_asks (
  run_id uuid not null, path text not null,
  asked_at timestamptz not null default engine_now(),
  answered_at timestamptz,
  primary key (run_id, path)
);

-- Buttons under messages. `token` is the callback data; it works for its owner only.
create table telegram_buttons (
  token text primary key,
  chat_id bigint not null,
  run_id uuid, path text,                     -- the ask that it answers
  action jsonb not null,
  created_at timestamptz not null default engine_now()
);
create index telegram_buttons_created_at on telegram_buttons (created_at);

-- Payments that came in and were not granted as they stand: an operator decides.
create table payment_disputes (
  charge_id text primary key,
  telegram_user_id bigint not null,
  user_id uuid references users,
  payload text not null, currency text not null, amount bigint not null,
  reason text not null,
  resolved_at timestamptz,
  received_at timestamptz not null default engine_now()
);
