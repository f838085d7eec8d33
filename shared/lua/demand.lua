-- How many units of a lane could be claimed now, counted up to a limit. ARGV: lane, limit.
local lane, limit = ARGV[1], tonumber(ARGV[2])
local now, count = now_ms(), 0
for _, owner in ipairs(redis.call('LRANGE', P .. 'owners:' .. lane, 0, -1)) do
  for _, id in ipairs(redis.call('LRANGE', P .. 'lane:' .. lane .. '|' .. owner, 0, -1)) do
    local state = field(id, 'state')
    if state == 'finalizing' or not field(id, 'stop_reason') then
      count = count + redis.call('ZCOUNT', key(id, 'retry'), '-inf', now)
      if state == 'in_progress' then
        count = count + tonumber(field(id, 'chunks')) - tonumber(field(id, 'next'))
      end
    end
    if count >= limit then return limit end
  end
end
return count
