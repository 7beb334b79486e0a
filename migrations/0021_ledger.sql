-- The ledger's second half: refunds by rule, purchases given back, users whose holds are stopped, reconciliation.
--
-- Forward only. The release before works on this schema: every new column has a default or may be null, and the states that
-- are new it never writes.
--
-- What an operator has to expect: one transaction, during which no attempt starts, ends or calls a model; they wait and go on. No
-- table is rewritten or scanned for a constraint. What takes time is the indexes at the end, some seconds per million rows of
-- `api_key_usage`, `credit_transactions` and `activity_attempts`. On a large database build those beforehand, each by its own
-- `create index concurrently` under the same name: they are skipped here then (drop what such a build left invalid). The file gives
-- up after five seconds of waiting for a lock, behind a long report or a dump for example, or if it met the job that gives rejected
-- runs back: nothing was changed then; run it again.
set local lock_timeout = '5s';
-- All at once and users first, as the hook does: whoever has locked no user row yet waits there and holds nothing that we need.
lock table users, activity_attempts, api_key_usage, payments in access exclusive mode;

-- Set by the hourly audit for the users that a broken invariant names: no new hold until an operator has looked. What stood open
-- at `holds_released_at` does not stop its user again.
alter table users add column holds_stopped_at timestamptz, add column holds_stopped_why text, add column holds_released_at timestamptz,
  add constraint users_holds_stopped_check check ((holds_stopped_at is null) = (holds_stopped_why is null)) not valid;

-- `refused`: the payment provider would not give the money back; the credits were given back instead.
alter table payments drop constraint payments_refund_state_check,
  add constraint payments_refund_state_check check (refund_state in ('none','requested','done','chargeback','refused')) not valid;
alter table payments add column refund_error text;  -- what the payment provider said last

-- Why a metered attempt failed, and whether another attempt of its step follows; null while it runs, and for rows of before.
alter table activity_attempts add column failure_code text, add column again boolean;

-- The refund policy: never updated, only inserted. In force for an attempt is, per rule, the newest `effective_from` at its end.
create table refund_rules (
  id bigint generated always as identity primary key,
  rule text not null check (rule ~ '^[a-z_]{1,40}$'),
  effective_from timestamptz not null,
  -- `unusable_calls`: the answers of an attempt that had not the required shape; `attempt`: all that an attempt paid;
  -- `rejected_run`: attempts of `activity` in runs that closed with a rejected verdict.
  gives text not null check (gives in ('unusable_calls','attempt','rejected_run')),
  failures text[] not null default '{}',      -- failure codes of the attempt
  activity text,                              -- null: any
  final_only boolean not null default false,  -- only if no other attempt of the step follows
  share_bps int not null check (share_bps between 0 and 10000),  -- 0: the rule is off
  source text not null,
  constraint refund_rules_key unique (rule, effective_from),
  constraint refund_rules_activity_check check (gives <> 'rejected_run' or activity is not null)
);
create trigger refund_rules_append_only before update or delete on refund_rules for each row execute function append_only();
insert into refund_rules (rule, effective_from, gives, failures, activity, final_only, share_bps, source) values
  ('unusable_answer', '2026-01-01', 'unusable_calls', '{model.output_invalid}', null, false, 10000, 'shipped'),
  ('provider_fault', '2026-01-01', 'attempt', '{transient.http,transient.network,transient.rate_limited,model.unavailable}', null, true, 10000, 'shipped'),
  ('verification_exhausted', '2026-01-01', 'rejected_run', '{}', 'verify@1', false, 10000, 'shipped');

-- Look-ups of calls whose outcome is unknown: how often was asked, and when to ask again.
alter table api_key_usage add column lookups int not null default 0, add column next_lookup_at timestamptz;

-- What a reconciliation found: one row per difference, seen again or resolved.
create table reconcile_findings (
  id bigint generated always as identity primary key,
  job text not null, kind text not null, subject text not null,
  message text not null,
  user_id uuid references users,
  first_seen_at timestamptz not null default engine_now(),
  last_seen_at timestamptz not null default engine_now(),
  seen int not null default 1,
  resolved_at timestamptz,
  constraint reconcile_findings_key unique (job, kind, subject)
);
create index reconcile_findings_open on reconcile_findings (last_seen_at) where resolved_at is null;

-- What a provider said that a key has used in all, beside our own sum at that instant: the differences of two rows are compared.
create table provider_totals (
  id bigint generated always as identity primary key,
  provider text not null, fingerprint bytea not null,
  usage_pusd numeric not null check (usage_pusd >= 0),       -- of this key
  account_pusd numeric not null check (account_pusd >= 0),   -- of the whole account
  own_pusd numeric not null check (own_pusd >= 0),           -- our sum of what this key's calls cost the platform
  read_at timestamptz not null default engine_now()
);
create index provider_totals_newest on provider_totals (provider, fingerprint, id desc);

-- How far a job that reads a list of the outside has come.
create table reconcile_cursors (job text primary key, position bigint not null check (position >= 0), updated_at timestamptz not null default engine_now());

-- Of a project's cap, of a user's report, and of the attempts beside one that meets a cap.
create index if not exists activity_attempts_project on activity_attempts (project_id);
create index if not exists activity_attempts_user on activity_attempts (user_id, ended_at);
create index if not exists activity_attempts_running_run on activity_attempts (run_id) where state = 'running';
create index if not exists activity_attempts_running_project on activity_attempts (project_id) where state = 'running';
create index if not exists api_key_usage_unknown on api_key_usage (provider, finished_at) where state = 'unknown' and provider_request_id is not null;
create index if not exists api_key_usage_finished on api_key_usage (finished_at);
create index if not exists payments_requested on payments (charge_id) where refund_state = 'requested';
create index if not exists credit_grants_expiry on credit_grants (expires_at) where expires_at is not null and remaining_ucr > held_ucr;
create index if not exists credit_transactions_created on credit_transactions (created_at);
-- Runs whose newest verdict is a rejection: the recent rejections, and whether one is the newest of its run.
create index if not exists project_records_rejected on project_records (created_at) where kind = 'verdict' and body->>'verdict' = 'reject';
create index if not exists project_records_verdicts on project_records (run_id, n desc) where kind = 'verdict';
