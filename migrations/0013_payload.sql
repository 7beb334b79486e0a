-- Payloads: values of more than 64 KiB, stored once a run, and documents that are sealed.
--
-- A document of `runs` (inputs, output, failure, cursor), `history` (events), `inbox` (payload), `checkpoints` (value),
-- `attempt_progress` (progress) or `schedules` (inputs) is plain JSON as before, or, when the program has payload keys,
--   {"$sealed": {"key": "<id of the key>", "data": "<base64: nonce, ciphertext, tag>"}}
-- Inside a document {"$loopwright": {"blob": "<hash>", "size": n}} stands for the value in `blobs`. What a user wrote and
-- looks so is kept as {"$loopwright": {"is": …}}. Rows of earlier releases stay as they are and are valid.

create table blobs (
  shard smallint not null, run_id uuid not null,
  -- SHA-256 of the value's text; under a payload key an HMAC of it, so that nobody can try what it is.
  hash bytea not null check (octet_length(hash) = 32),
  key text,                             -- id of the payload key that sealed the bytes; null: plain
  size int not null check (size > 0),   -- of the text, in bytes
  bytes bytea not null,                 -- deflated; sealed after that
  created_at timestamptz not null default engine_now(),
  primary key (shard, run_id, hash),
  -- A run's values go with it: there is nothing to collect, and no reference of a run that is there leads nowhere.
  constraint blobs_run_fkey foreign key (shard, run_id) references runs (shard, run_id) on delete cascade
);
-- They are compressed already, and nobody wants a part of one.
alter table blobs alter column bytes set storage external;
