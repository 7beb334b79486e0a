-- What a step waits for is known; costs that no provider can mean are doubts; the list that prices were taken from is kept.
--
-- Forward only. The release before works on this schema: every new column may be null, and it reads none of what is new.
--
-- What an operator has to expect: one transaction, and no table is rewritten or scanned but `runs`, of which an index is built over the
-- runs that continue others. Gives up after five seconds of waiting for a lock; nothing was changed then, run it again.
set local lock_timeout = '5s';

-- Of an attempt that was stopped in its middle: what its refused call needs, with those that were under way. The next attempt of the
-- step does not start before so much is there.
alter table activity_attempts add column needed_ucr bigint check (needed_ucr > 0);

-- The runs of a chain, whose caps are one.
create index runs_chain on runs (first_run_id) where first_run_id is not null;

-- What a provider says that a call has cost and nobody believes: negative, no number, far beyond the call's tokens at their prices. The
-- call is charged by our own arithmetic; what was said is kept here for an operator, and OpenRouter is asked again.
create table cost_doubts (
  usage_id bigint primary key references api_key_usage,
  user_id uuid not null references users,
  said text not null,                          -- in USD, as it was said
  charged_pusd bigint not null check (charged_pusd >= 0),
  found_at timestamptz not null default engine_now(),
  resolved_at timestamptz,
  resolution text,
  constraint cost_doubts_resolved_check check ((resolved_at is null) = (resolution is null))
);
create index cost_doubts_open on cost_doubts (found_at) where resolved_at is null;

-- Who resolved a finding by hand says why.
alter table reconcile_findings add column resolution text;

-- Why a payment was given back, for its payer.
alter table payments add column refund_reason text;

-- What the newest imported price map says, model by model, whether it was taken over or only looked at.
create table price_map (
  provider text not null, model_id text not null,
  tiers jsonb not null,
  source text not null,
  read_at timestamptz not null default engine_now(),
  primary key (provider, model_id)
);
