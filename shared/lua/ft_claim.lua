-- ARGV: lane, worker, ttl ms, GPUs that the worker has -> nil, or {job, unit, token, attempts}.
-- Owners take turns, and each owner's jobs do. A job that needs more GPUs is passed over.
local lane, worker, ttl, gpus = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local now = now_ms()
local owners = P .. 'owners:' .. lane

local function fits(id)
  return lane ~= FT_LANES.queued or tonumber(field(id, 'gpus')) <= math.max(gpus, 1)
end

for _ = 1, redis.call('LLEN', owners) do
  local owner = redis.call('RPOPLPUSH', owners, owners)
  local queue = P .. 'lane:' .. lane .. '|' .. owner
  for _ = 1, redis.call('LLEN', queue) do
    local member = redis.call('RPOPLPUSH', queue, queue)
    local id, unit = ft_unit(member)
    if redis.call('EXISTS', key(id)) == 0 then
      drop_out(lane, owner, member)
    elseif ft_is_due(id, unit, now) and fits(id) then
      drop_out(lane, owner, member)
      if unit == JOB then redis.call('HDEL', key(id), 'lane', 'waiting_for') end
      redis.call('HDEL', key(id, 'delays'), unit)
      local token = grant_lease(id, unit, worker, now + ttl)
      local attempts = unit == JOB and field(id, 'attempts')
        or redis.call('HGET', key(id, 'tries'), unit) or 0
      return { id, unit, token, tonumber(attempts) }
    end
  end
end
return nil
