-- What the REST side needs of its own: the idea of a project, answers under the keys that callers chose.

-- What is to be built, as the user said it: input of the project's loop.
alter table projects add column if not exists idea text not null default '';

-- One row per (user, key). `status` is null while the first request is worked on; `turn` rises when an abandoned
-- request is claimed again, and only the newest turn may answer. `run_id` is the same for all turns: a run that the request starts
-- has it, so that no turn starts another. Rows older than a day are removed as new ones come.
create table idempotency_keys (
  user_id uuid not null references users,
  key text not null check (octet_length(key) between 1 and 255),
  request_sha256 bytea not null check (octet_length(request_sha256) = 32),
  turn int not null default 1,
  run_id uuid not null,
  created_at timestamptz not null default engine_now(),
  claimed_at timestamptz not null default engine_now(),
  status int check (status between 200 and 599),
  location text,
  body text,
  primary key (user_id, key),
  constraint idempotency_keys_answer_check check ((status is null) = (body is null))
);
create index idempotency_keys_created_at on idempotency_keys (created_at);
