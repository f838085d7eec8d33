-- ARGV: lane, worker, ttl ms -> nil, or {batch, unit, token, attempts before this one, spec, model}.
-- Owners take turns, and each owner's batches take turns: both lists rotate by one per look.
local lane, worker, ttl = ARGV[1], ARGV[2], tonumber(ARGV[3])
local now = now_ms()
local owners = P .. 'owners:' .. lane

local function next_unit(id)
  local due = redis.call('ZRANGEBYSCORE', key(id, 'retry'), '-inf', now, 'LIMIT', 0, 1)
  if due[1] then
    redis.call('ZREM', key(id, 'retry'), due[1])
    return due[1]
  end
  if field(id, 'state') ~= 'in_progress' then return nil end
  local upcoming = tonumber(field(id, 'next'))
  if upcoming >= tonumber(field(id, 'chunks')) then return nil end
  redis.call('HSET', key(id), 'next', upcoming + 1)
  return tostring(upcoming)
end

local function grant(id, unit)
  local token = grant_lease(id, unit, worker, now + ttl)
  redis.call('HSET', key(id), 'touched', now)
  if tonumber(unit) then begin_pace(id) end
  recount(id)
  local attempts = redis.call('HGET', key(id, 'attempts'), unit)
  return { id, unit, token, tonumber(attempts or 0), field(id, 'spec'), field(id, 'model') or '' }
end

for _ = 1, redis.call('LLEN', owners) do
  local owner = redis.call('RPOPLPUSH', owners, owners)
  local queue = P .. 'lane:' .. lane .. '|' .. owner
  for _ = 1, redis.call('LLEN', queue) do
    local id = redis.call('RPOPLPUSH', queue, queue)
    local stopped = field(id, 'stop_reason') and field(id, 'state') ~= 'finalizing'
    local unit = not stopped and next_unit(id)
    if unit then return grant(id, unit) end
  end
end
return nil
