-- Users, projects, prices, calls, credits.
--
-- Integers only: prices in micro-USD per million tokens (`_umtok`, the same as pico-USD per token), costs of calls in
-- pico-USD (`_pusd`), the ledger in micro-credits (`_ucr`). `credit_transactions` is the ledger: append-only, every row a
-- double entry between the user and `counter_account`. The three ledger columns of `users` are its cache; `credit_grants`
-- says which credits are left, `credit_allocations` which of them a hold has reserved.
--
-- An attempt that may call models is a row of `activity_attempts`, written in the engine's transition that starts it, together
-- with its first hold. A hold that turns out too small is extended by another hold row of the same attempt (`hold_no` 2, 3, …).
-- At the attempt's end every hold of it gets one capture row: the attempt's cost is taken from its holds in their order, what
-- is left of them is released in the same rows, and what exceeds them all stands as `uncollected_ucr` in the last one. So the sum
-- over an attempt's captures of `actual_ucr` is its cost, rounded up once.

create table users (
  id uuid primary key default gen_random_uuid(),
  telegram_user_id bigint unique,
  auth_issuer text, auth_subject text,
  locale text,
  status text not null default 'active' check (status in ('active','blocked','deleted')),
  credit_balance_ucr bigint not null default 0 constraint users_balance_check check (credit_balance_ucr >= 0),
  credit_held_ucr bigint not null default 0 check (credit_held_ucr >= 0),
  ledger_seq bigint not null default 0,
  created_at timestamptz not null default engine_now(),
  constraint users_auth_key unique (auth_issuer, auth_subject),
  constraint users_held_check check (credit_held_ucr <= credit_balance_ucr)
);

create table projects (
  id uuid primary key default gen_random_uuid(),
  user_id uuid not null references users,
  name text not null,
  idea text not null default '',
  status text not null default 'open' check (status in ('open','running','done','failed','archived')),
  workflow_name text not null default 'dev-loop',
  workflow_hash bytea,
  budget_cap_ucr bigint check (budget_cap_ucr > 0),
  created_at timestamptz not null default engine_now()
);
create index projects_user on projects (user_id, created_at desc);

-- A key that comes from the environment is known by its fingerprint only; a sealed one is stored as ciphertext.
create table api_keys (
  id uuid primary key default gen_random_uuid(),
  provider text not null check (provider in ('gemini','openrouter','openai_compatible','rehearsed')),
  user_id uuid references users,              -- null: the platform's
  source text not null check (source in ('environment','sealed')),
  label text not null default '', base_url text,
  ciphertext bytea, nonce bytea, wrapped_dek bytea, kek_id text, envelope_version smallint not null default 1,
  last4 text not null check (length(last4) <= 4),
  fingerprint bytea not null,                 -- keyed hash of the key
  status text not null default 'active' check (status in ('active','cooling','disabled','revoked')),
  disabled_reason text, cooldown_until timestamptz,
  created_at timestamptz not null default engine_now(), rotated_at timestamptz,
  constraint api_keys_sealed_check check ((source = 'sealed') = (ciphertext is not null and nonce is not null and wrapped_dek is not null and kek_id is not null))
);
create unique index api_keys_fingerprint_key on api_keys (provider, fingerprint, coalesce(user_id, '00000000-0000-0000-0000-000000000000'));

-- Never updated, only inserted. The row of a call: the newest `effective_from` at its start, then the largest
-- `min_prompt_tokens` below its prompt. `model_id` '*' serves the models of openai_compatible that have no row of their own.
create table model_pricing (
  id bigint generated always as identity primary key,
  provider text not null, model_id text not null, service_tier text not null default 'standard',
  effective_from timestamptz not null,
  min_prompt_tokens bigint not null default 0 check (min_prompt_tokens >= 0),
  input_umtok bigint not null check (input_umtok >= 0),
  cached_input_umtok bigint check (cached_input_umtok >= 0),
  cache_write_umtok bigint check (cache_write_umtok >= 0),
  cache_write_1h_umtok bigint check (cache_write_1h_umtok >= 0),
  output_umtok bigint not null check (output_umtok >= 0),
  reasoning_umtok bigint check (reasoning_umtok >= 0),
  per_request_pusd bigint not null default 0 check (per_request_pusd >= 0),
  context_tokens bigint, max_output_tokens bigint,
  billable boolean not null default true,
  source text not null, source_read_at timestamptz not null default engine_now(),
  constraint model_pricing_key unique (provider, model_id, service_tier, effective_from, min_prompt_tokens)
);

create table activity_attempts (
  id uuid primary key,
  run_id uuid not null, path text not null, activity text not null,
  attempt_no int not null check (attempt_no > 0),
  user_id uuid not null references users, project_id uuid references projects,
  state text not null constraint activity_attempts_state_check check (state in ('running','completed','failed','lost')),
  lease_expires_at timestamptz not null,      -- the attempt may not run beyond
  started_at timestamptz not null default engine_now(), ended_at timestamptz,
  constraint activity_attempts_key unique (run_id, path, attempt_no),
  constraint activity_attempts_ended_check check ((state = 'running') = (ended_at is null))
);
create index activity_attempts_run on activity_attempts (run_id);

create table credit_grants (
  id uuid primary key default gen_random_uuid(),
  user_id uuid not null references users,
  source text not null check (source in ('welcome','purchase','promo','adjustment')),
  source_ref text not null,
  amount_ucr bigint not null check (amount_ucr > 0),
  remaining_ucr bigint not null check (remaining_ucr >= 0),
  held_ucr bigint not null default 0 check (held_ucr >= 0),
  priority smallint not null default 50 check (priority between 0 and 100),  -- lower burns first
  expires_at timestamptz, created_at timestamptz not null default engine_now(),
  constraint credit_grants_source_key unique (source, source_ref),
  constraint credit_grants_remaining_check check (remaining_ucr <= amount_ucr),
  constraint credit_grants_held_check check (held_ucr <= remaining_ucr)
);
create index credit_grants_user on credit_grants (user_id) where remaining_ucr > 0;

create table credit_transactions (
  id bigint generated always as identity primary key,
  user_id uuid not null references users,
  seq bigint not null,
  kind text not null check (kind in ('grant','purchase','hold','capture','expire','refund','adjustment')),
  amount_ucr bigint not null,
  held_delta_ucr bigint not null default 0,
  balance_after_ucr bigint not null check (balance_after_ucr >= 0),
  held_after_ucr bigint not null check (held_after_ucr >= 0),
  counter_account text not null,
  idempotency_key text not null constraint credit_transactions_idempotency_key unique,
  hold_txn_id bigint unique references credit_transactions,
  attempt_id uuid references activity_attempts,
  hold_no int,
  grant_id uuid references credit_grants,
  rate_credits_per_usd bigint, markup_bps int,
  actual_ucr bigint check (actual_ucr >= 0),
  uncollected_ucr bigint not null default 0 check (uncollected_ucr >= 0),
  created_at timestamptz not null default engine_now(),
  constraint credit_transactions_seq_key unique (user_id, seq),
  check (held_after_ucr <= balance_after_ucr),
  check ((kind = 'capture') = (hold_txn_id is not null)),
  check ((kind in ('hold','capture')) = (attempt_id is not null)),
  check ((kind = 'hold') = (hold_no is not null and rate_credits_per_usd is not null and markup_bps is not null)),
  check ((kind = 'capture') = (actual_ucr is not null)),
  check (case kind
    when 'hold'     then amount_ucr = 0 and held_delta_ucr > 0
    when 'capture'  then amount_ucr <= 0 and held_delta_ucr < 0 and -amount_ucr <= -held_delta_ucr and actual_ucr = -amount_ucr + uncollected_ucr
    when 'grant'    then amount_ucr > 0 and held_delta_ucr = 0 and grant_id is not null
    when 'purchase' then amount_ucr > 0 and held_delta_ucr = 0 and grant_id is not null
    else amount_ucr < 0 and held_delta_ucr = 0 and grant_id is not null end)
);
create unique index credit_transactions_hold_key on credit_transactions (attempt_id, hold_no) where kind = 'hold';
create index credit_transactions_attempt on credit_transactions (attempt_id) where attempt_id is not null;

create function append_only() returns trigger language plpgsql as
  $$ begin raise exception '% is append-only', tg_table_name; end $$;
create trigger credit_transactions_append_only before update or delete on credit_transactions for each row execute function append_only();
create trigger model_pricing_append_only before update or delete on model_pricing for each row execute function append_only();

create table credit_allocations (
  hold_txn_id bigint not null references credit_transactions,
  grant_id uuid not null references credit_grants,
  held_ucr bigint not null check (held_ucr > 0),
  captured_ucr bigint check (captured_ucr between 0 and held_ucr),
  primary key (hold_txn_id, grant_id)
);
create index credit_allocations_grant on credit_allocations (grant_id);

-- One row per call, written before it is made.
create table api_key_usage (
  id bigint generated always as identity primary key,
  attempt_id uuid not null references activity_attempts,
  call_no int not null,
  call_key text not null,
  api_key_id uuid not null references api_keys,
  user_id uuid not null references users, project_id uuid references projects,
  provider text not null, model_requested text not null, model_served text,
  purpose text not null,
  request_sha256 bytea not null,
  state text not null check (state in ('started','succeeded','failed','unknown')),
  late boolean not null default false,         -- reported after its attempt had ended: a fact, never charged
  provider_request_id text,
  http_status int, error_class text, finish_reason text, stream_completed boolean,
  tokens_prompt bigint check (tokens_prompt >= 0),
  tokens_cached bigint check (tokens_cached >= 0),
  tokens_cache_write bigint check (tokens_cache_write >= 0),
  tokens_output bigint check (tokens_output >= 0),
  tokens_reasoning bigint check (tokens_reasoning >= 0),
  usage_source text not null default 'none' check (usage_source in ('provider','lookup','estimated','none')),
  pricing_id bigint not null references model_pricing,
  worst_pusd bigint not null check (worst_pusd >= 0),  -- what it may cost at most, while it runs
  cost_pusd bigint not null default 0 check (cost_pusd >= 0),
  provider_cost_pusd bigint check (provider_cost_pusd >= 0),
  raw_usage jsonb,
  started_at timestamptz not null default engine_now(), finished_at timestamptz,
  constraint api_key_usage_call_no_key unique (attempt_id, call_no),
  constraint api_key_usage_call_key unique (attempt_id, call_key),
  check (tokens_cached <= tokens_prompt), check (tokens_reasoning <= tokens_output),
  check ((state = 'started') = (finished_at is null)),
  check (not late or cost_pusd = 0),
  check (state <> 'succeeded' or (tokens_prompt is not null and tokens_output is not null and usage_source <> 'none'))
);
-- Servers of one's own may repeat their ids, so this finds and does not forbid.
create index api_key_usage_request on api_key_usage (provider, provider_request_id) where provider_request_id is not null;

create table conversations (
  id bigint generated always as identity primary key,
  project_id uuid not null references projects, user_id uuid not null references users,
  thread text not null default 'main', seq int not null,
  role text not null check (role in ('system','user','model','tool')),
  parts jsonb not null,
  dedupe_key text,                             -- who writes the same turn twice writes it once
  attempt_id uuid,
  telegram_chat_id bigint, telegram_message_id bigint, telegram_thread_id bigint,
  created_at timestamptz not null default engine_now(),
  constraint conversations_seq_key unique (project_id, thread, seq),
  constraint conversations_dedupe_key unique (project_id, thread, dedupe_key)
);

create table project_files (
  project_id uuid not null references projects, path text not null, version int not null,
  sha256 bytea not null check (octet_length(sha256) = 32), size_bytes bigint not null,
  content bytea, deleted boolean not null default false,
  attempt_id uuid, created_at timestamptz not null default engine_now(),
  primary key (project_id, path, version),
  constraint project_files_path_check check (path !~ '(^|/)\.\.?(/|$)' and path !~ '^/' and path <> '')
);

create table orders (
  id uuid primary key default gen_random_uuid(),
  payload text not null unique check (octet_length(payload) between 1 and 128),
  user_id uuid not null references users,
  stars int not null check (stars > 0), credits_ucr bigint not null check (credits_ucr > 0),
  state text not null check (state in ('open','paid','expired')), expires_at timestamptz not null,
  created_at timestamptz not null default engine_now()
);
create table payments (
  charge_id text primary key,
  order_id uuid not null references orders, user_id uuid not null references users,
  stars int not null check (stars > 0), recurring boolean not null default false,
  refund_state text not null default 'none' check (refund_state in ('none','requested','done','chargeback')),
  received_at timestamptz not null default engine_now()
);

-- List prices of 2026-11-24, with the changes that are announced; OpenRouter passes them on.
insert into model_pricing (provider, model_id, effective_from, min_prompt_tokens, input_umtok, cached_input_umtok, output_umtok, context_tokens, max_output_tokens, source)
select p.provider, p.prefix || m.model, m.since::timestamptz, m.floor, m.input, m.cached, m.output, 1048576, 65536, 'list 2026-11-24'
from (values ('gemini', ''), ('openrouter', 'google/')) as p(provider, prefix),
     (values
       ('gemini-4-argon',         '2026-01-01', 0,      2000000, 100000, 10000000),
       ('gemini-4-argon',         '2026-12-01', 0,      4000000, 200000, 20000000),
       ('gemini-3.8-flash',       '2026-01-01', 0,       750000,  75000,  3750000),
       ('gemini-3.8-flash',       '2027-01-01', 0,      1500000, 150000,  7500000),
       ('gemini-3.7-flash',       '2026-01-01', 0,       750000,  75000,  3750000),
       ('gemini-3.7-flash',       '2027-01-01', 0,      1500000, 150000,  7500000),
       ('gemini-3.6-flash',       '2026-01-01', 0,       750000,  75000,  3750000),
       ('gemini-3.6-flash',       '2027-01-01', 0,      1500000, 150000,  7500000),
       ('gemini-3.5-flash',       '2026-01-01', 0,      1500000, 150000,  9000000),
       ('gemini-3.5-flash-lite',  '2026-01-01', 0,       300000,  30000,  2500000),
       ('gemini-3.1-flash-lite',  '2026-01-01', 0,       250000,  25000,  1500000),
       ('gemini-3.1-pro-preview', '2026-01-01', 0,      2000000, 200000, 12000000),
       ('gemini-3.1-pro-preview', '2026-01-01', 200000, 4000000, 400000, 18000000),
       ('gemini-2.5-pro',         '2026-01-01', 0,      1250000, 125000, 10000000),
       ('gemini-2.5-pro',         '2026-01-01', 200000, 2500000, 250000, 15000000),
       ('gemini-2.5-flash',       '2026-01-01', 0,       300000,  30000,  2500000),
       ('gemini-2.5-flash-lite',  '2026-01-01', 0,       100000,  10000,   400000)
     ) as m(model, since, floor, input, cached, output);

-- The rehearsed models cost a little, so that a rehearsal moves the ledger; servers of one's own cost the operator's default.
insert into model_pricing (provider, model_id, effective_from, input_umtok, output_umtok, source)
values ('rehearsed', 'rehearsed/architect',   '2026-01-01', 2000000, 10000000, 'rehearsal'),
       ('rehearsed', 'rehearsed/implementer', '2026-01-01',  300000,  2500000, 'rehearsal'),
       ('rehearsed', 'rehearsed/utility',     '2026-01-01',  100000,   400000, 'rehearsal'),
       ('openai_compatible', '*',             '2026-01-01',  100000,   400000, 'default: insert a row for the model to change it');
