-- Models that a key may not use, as all workers know it. A key rests for one model or for all in its own row; several that it
-- may not use need rows of their own, or two of them would make it the key's.
--
-- Forward only. The release before does not read it, and asks such a model again.
create table api_key_models (
  api_key_id uuid not null references api_keys on delete cascade,
  model text not null,
  forbidden_until timestamptz not null,
  reason text not null,                         -- failure code
  primary key (api_key_id, model)
);
create index api_key_models_until on api_key_models (forbidden_until);
