-- Rests of keys for one model, as all workers know them: limits are per key and model at most providers, and two models that are
-- busy at once must not take the key from a third. A key that rests for every model does so in its own row, as before.
--
-- Forward only. The release before does not read it: it asks such a model again, is refused, and lets the key rest in its own row.
create table api_key_rests (
  api_key_id uuid not null references api_keys on delete cascade,
  model text not null,
  rests_until timestamptz not null,
  reason text not null,                         -- failure code
  refusals int not null check (refusals > 0),   -- in a row; where no wait is named each doubles it
  primary key (api_key_id, model)
);
create index api_key_rests_until on api_key_rests (rests_until);
